"""One colour for each run, on a light and on a dark page: the palette of Okabe and Ito, which
colour-blind readers can tell apart, with the contrast of some colours increased."""

from __future__ import annotations

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#c0609a", "#b98700", "#3f9fd8", "#5b4fa3", "#6b6b6b")
DARK = ("#4ba3dd", "#f08a4b", "#2fc79a", "#e08fc0", "#e6b93d", "#8ad0f7", "#a89cf0", "#b5b5b5")
INK, GRID = "#646b73", "#e2e0dc"
"""Text and lines of a plot on a light page."""

VARIABLES = {
    "light": {"paper": "#fbfaf8", "card": "#ffffff", "ink": "#23272c", "quiet": INK, "rule": GRID},
    "dark": {
        "paper": "#15181c",
        "card": "#1d2126",
        "ink": "#e6e8ea",
        "quiet": "#9aa2ab",
        "rule": "#343a41",
    },
}


def run_colour(run: int) -> str:
    """The colour of a run in a plot; it repeats where there are more runs than colours."""
    return LIGHT[run % len(LIGHT)]


def with_variables(svg: str) -> str:
    """``svg`` with its colours replaced by CSS variables, which follow the reader's scheme."""
    for index, colour in enumerate(LIGHT):
        svg = svg.replace(colour, f"var(--run{index})")
    return svg.replace(INK, "var(--quiet)").replace(GRID, "var(--rule)")


def _declarations(scheme: str, runs: tuple[str, ...]) -> str:
    values = VARIABLES[scheme] | {f"run{index}": colour for index, colour in enumerate(runs)}
    return ":root{" + "".join(f"--{key}:{value};" for key, value in values.items()) + "}"


SCHEMES = (
    f"{_declarations('light', LIGHT)}"
    f"@media (prefers-color-scheme:dark){{{_declarations('dark', DARK)}}}"
)
FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif"
SVG_STYLE = f"{SCHEMES}text{{font-family:{FONTS}!important}}"
