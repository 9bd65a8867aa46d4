"""Options of ``--plan``, in addition to those of the planned job."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.base import Strict
from schemas.extract import ExtractConfig
from schemas.run import RunConfig

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prices(Strict):
    """Prices of compute and storage, in one currency. The defaults are assumptions in US dollars;
    prices differ by provider, contract and year."""

    currency: Annotated[str, Field(pattern=r"^\S{1,8}$")] = "USD"
    """Currency of the prices given here, and of the costs."""

    device_hour: NotNegative | None = None
    """Price of one hour of a device (a GPU, or all timed CPU cores). Assumed by default: 3 for a
    GPU, as an H100 on demand costs 2 to 4; 0.05 per CPU core, about the list price of a cloud
    vCPU."""
    tb_month: NotNegative = 23.0
    """Price of storing 10^12 bytes for a month. Assumed by default: the list price of S3 Standard
    in a US region. Transfers and requests are not included."""


class PlanOptions(Strict):
    """Assumptions of a cost estimate."""

    prices: Prices = Prices()
    months: NotNegative = 3.0
    """Months for which the store is kept. Default: the duration of one study."""
    runs: Annotated[int, Field(ge=1)] = 8
    """Aligned runs that share the store. Default: the five aligned configs of a student in
    jobs/configs/, and three more for seeds or a sweep."""
    gb_per_second: Positive = 2.0
    """Bandwidth in 10^9 bytes per second of one reading worker or one writing encoder. Default:
    about the rate at which one process copies into batches (measured: 1.7 to 1.9); a node of eight
    GPUs needs local disks or a 200 Gbit/s network for it."""
    device: Literal["auto", "cpu"] = "auto"
    """Device of the estimate: 'auto' is this machine's GPU, timed, or without one an assumed GPU of
    200 TFLOP/s (an H100 in bfloat16); 'cpu' is this machine's CPU cores."""
    tflops: Positive | None = None
    """Sustained 10^12 FLOP per second of another device in a transformer (200 to 300 for an H100 in
    bfloat16). Default: that of --plan.device."""

    @model_validator(mode="after")
    def _one_device(self) -> PlanOptions:
        if self.device == "cpu" and self.tflops is not None:
            raise ValueError("tflops and device cpu exclude each other: give one")
        return self


class ExtractPlanOptions(PlanOptions):
    """Options of the estimate of an extraction."""

    trainer: str | None = None
    """YAML file of the training run that will read the store (jobs/configs/). Default: SiT-XL/2
    with termination at step 250,000, the paper's main run."""
    images: Annotated[int, Field(ge=1)] | None = None
    """Images of the data set. Default: counted in --source if given, else ImageNet-1k's."""


class ExtractPlan(ExtractConfig):
    """Options of ``python -m pipeline.extract --plan``; the fields added here are not part of an
    extraction or a manifest."""

    plan: ExtractPlanOptions = ExtractPlanOptions()
    wide: bool = False
    """Print all columns, the counts behind them and all advice, instead of five columns."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a table."""


class TrainPlan(RunConfig):
    """Options of ``jobs/train_haste.py --plan``; the fields added here are not part of a run or a
    checkpoint."""

    plan: PlanOptions = PlanOptions()
    extract: ExtractConfig = ExtractConfig()
    """The extraction that makes the store, if --store does not exist; defaults of the data set
    apply as in an extraction."""
    images: Annotated[int, Field(ge=1)] | None = None
    """Images of the data set. Default: the store's, else counted in --extract.source if given,
    else ImageNet-1k's."""
    wide: bool = False
    """Print all columns, the counts behind them and all advice, instead of five columns."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a table."""
