"""One colour for each run, on light and on dark paper: Okabe and Ito's, which colour-blind people
can tell apart, some darkened or lightened until they stand out."""

from __future__ import annotations

from dataclasses import dataclass

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#c0609a", "#b98700", "#3f9fd8", "#5b4fa3", "#6b6b6b")
DARK = ("#4ba3dd", "#f08a4b", "#2fc79a", "#e08fc0", "#e6b93d", "#8ad0f7", "#a89cf0", "#b5b5b5")

PAPER = {
    "light": {"paper": "#fbfaf8", "card": "#ffffff", "ink": "#23272c", "quiet": "#646b73"},
    "dark": {"paper": "#15181c", "card": "#1d2126", "ink": "#e6e8ea", "quiet": "#9aa2ab"},
}
RULE = {"light": "#e2e0dc", "dark": "#343a41"}


@dataclass(frozen=True)
class Colours:
    """What a panel is drawn with."""

    runs: tuple[str, ...]
    ink: str
    grid: str

    def run(self, index: int) -> str:
        """More runs than colours begin again, with other dashes."""
        return self.runs[index % len(self.runs)]


COLOURS = Colours(LIGHT, PAPER["light"]["quiet"], RULE["light"])


def scheme(name: str) -> str:
    """Declarations of CSS variables for 'light' or 'dark'."""
    runs = LIGHT if name == "light" else DARK
    values = {**PAPER[name], "rule": RULE[name]}
    values |= {f"run{index}": colour for index, colour in enumerate(runs)}
    return "".join(f"--{key}:{value};" for key, value in values.items())


def variables(svg: str) -> str:
    """Colours of a drawing replaced by the variables that stand for them."""
    for index, colour in enumerate(COLOURS.runs):
        svg = svg.replace(colour, f"var(--run{index})")
    return svg.replace(COLOURS.ink, "var(--quiet)").replace(COLOURS.grid, "var(--rule)")


SCHEMES = (
    f":root{{{scheme('light')}}}@media (prefers-color-scheme:dark){{:root{{{scheme('dark')}}}}}"
)
FONTS = "system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',sans-serif"
SVG_STYLE = f"{SCHEMES}text{{font-family:{FONTS}!important}}"
