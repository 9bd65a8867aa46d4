"""A warning where torch.compile gives up on a function."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class _LimitFilter(logging.Filter):
    """Replaces Dynamo's warning, of which a user cannot tell what to do, by one that names the
    options."""

    def filter(self, record: logging.LogRecord) -> bool:
        if "hit config." not in str(record.msg):
            return True
        lines = [line.strip() for line in record.getMessage().splitlines()]
        function = next((line for line in lines if line.startswith("function:")), lines[0])
        logger.warning(
            "torch.compile has made all the variants that it allows (%s): others run uncompiled, "
            "slower. Choose a --workers.micro-batch that divides each worker's share of "
            "--global-batch, or --compute.compile off",
            function,
        )
        return False


_FILTER = _LimitFilter()


def report_compile_limit() -> None:
    """Log a warning that names the options when Dynamo's limit of variants is reached."""
    logging.getLogger("torch._dynamo.convert_frame").addFilter(_FILTER)
