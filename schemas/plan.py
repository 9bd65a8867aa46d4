"""What a plan assumes: the options of ``--plan``, beside those of the job that is planned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from schemas.base import Strict
from schemas.extract import ExtractConfig
from schemas.run import RunConfig

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Prices(Strict):
    """What compute and storage cost, in one currency. The defaults are assumptions, in US dollars:
    prices differ by provider, contract and year, so give your own."""

    device_hour: NotNegative | None = None
    """Price of an hour of one device (a GPU, or all the cores that were timed). Default, an
    assumption: 3 for a GPU, since an H100 on demand costs 2 to 4; 0.05 per core of a CPU, about the
    list price of a cloud's vCPU."""
    tb_month: NotNegative = 23.0
    """Price of 10^12 bytes kept for a month. Default, an assumption: the list price of S3 Standard
    in a region of the US; transfers and requests are not priced."""


class PlanOptions(Strict):
    """What the arithmetic of a plan is done with."""

    prices: Prices = Prices()
    months: NotNegative = 3.0
    """Months for which the store is kept. Default: a season, the time that one study takes."""
    runs: Annotated[int, Field(ge=1)] = 8
    """Aligned runs that share the store. Default: the five aligned configs that jobs/configs/
    has for a student, and three more for seeds or a sweep."""
    gb_per_second: Positive = 2.0
    """10^9 bytes per second that one worker can read from the store's storage, and one encoder
    write to it. Default: about what one reading process was measured to copy into batches (1.7 to
    1.9); for a node of eight GPUs it takes local disks or a 200 Gbit/s network."""
    device: Literal["auto", "cpu"] = "auto"
    """What costs are for: 'auto' is this machine's GPU, timed, or an assumed one of 200 TFLOP/s (an
    H100 in bfloat16) where it has none, since nobody trains on cores what is trained on GPUs; 'cpu'
    prices this machine's cores."""
    tflops: Positive | None = None
    """Plan for another device than this one: its sustained 10^12 FLOP per second in a transformer
    (200 to 300 for an H100 in bfloat16). Default: as --plan.device says."""
    autoencoder_tflops: Positive | None = None
    """The same in the autoencoder, which runs in float32. Default: measured; of a device that is
    not here a tenth of its TFLOP/s, since the float32 peak of datacenter GPUs is about a fifteenth
    of bfloat16's."""

    @model_validator(mode="after")
    def _one_device(self) -> PlanOptions:
        if self.device == "cpu" and self.tflops is not None:
            raise ValueError("tflops plans for another device than device cpu: give one of them")
        return self


class ExtractPlanOptions(PlanOptions):
    """A plan before anything is extracted."""

    trainer: str | None = None
    """YAML file of the training run that will read the store (jobs/configs/). Default: SiT-XL/2
    with the alignment ending at step 250,000, the paper's main run."""
    images: Annotated[int, Field(ge=1)] | None = None
    """Images of the data set. Default: counted where --source is given, else ImageNet-1k's."""


class ExtractPlan(ExtractConfig):
    """Options of ``python -m pipeline.extract --plan``. Extractions and their manifests never see
    the ones that are only here."""

    plan: ExtractPlanOptions = ExtractPlanOptions()
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a table."""


class TrainPlan(RunConfig):
    """Options of ``jobs/train_haste.py --plan``. Runs and their checkpoints never see the ones that
    are only here."""

    plan: PlanOptions = PlanOptions()
    extract: ExtractConfig = ExtractConfig()
    """The extraction that would make the store, where --store names none that exists; its data set
    brings the same defaults as in an extraction."""
    images: Annotated[int, Field(ge=1)] | None = None
    """Images of the data set. Default: the store's, else counted where --extract.source is given,
    else ImageNet-1k's."""
    as_json: Annotated[bool, Field(alias="json")] = False
    """Print one JSON object instead of a table."""
