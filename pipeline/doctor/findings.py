"""Judgement of what the nodes have reported, and its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

from pipeline.text import describe_bytes
from schemas.errors import plain_text

T = TypeVar("T")
Status = Literal["ok", "note", "fail"]
"""'note': worth knowing, or a check that was left out; it fails nothing."""
MAX_CLOCK = 5.0
"""Seconds by which a node's clock may differ: logs are compared by time, and S3 refuses requests
that are a quarter of an hour off."""
MIN_SHM = 1 << 30
"""Bytes of shared memory for Ray's objects and NCCL. Docker's default is 64 MiB."""


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    status: Status
    check: str
    node: str
    found: str


@dataclass(frozen=True)
class Failure:
    """An error in place of a node's answer."""

    message: str


Answers = Mapping[str, T | Failure]
"""Answer of each node, by its name."""


def judge_versions(answers: Answers[dict[str, str]], own: dict[str, str]) -> list[Finding]:
    """Versions must be those of this process, the driver."""
    findings = []
    for node, answer in answers.items():
        if isinstance(answer, Failure):
            findings.append(Finding("fail", "versions", node, answer.message))
            continue
        others = [
            f"{name} {answer.get(name, 'missing')} (driver: {version})"
            for name, version in own.items()
            if answer.get(name) != version
        ]
        same = f"python {own['python']}, torch {own['torch']}, ray {own['ray']}"
        found = "; ".join(others) or same
        findings.append(Finding("fail" if others else "ok", "versions", node, found))
    return findings


def judge_clocks(answers: Answers[tuple[float, float]]) -> list[Finding]:
    """(offset to the driver, uncertainty) in seconds."""
    return [
        Finding("fail", "clock", node, answer.message)
        if isinstance(answer, Failure)
        else Finding(
            "fail" if abs(answer[0]) - answer[1] > MAX_CLOCK else "ok",
            "clock",
            node,
            f"{answer[0]:+.3f} s to the driver's, within {answer[1]:.3f} s"
            + (": set it by NTP" if abs(answer[0]) - answer[1] > MAX_CLOCK else ""),
        )
        for node, answer in answers.items()
    ]


def judge_read(answers: Answers[float], need: float | None) -> list[Finding]:
    """Bytes per second of each node against ``need``."""
    findings = []
    for node, answer in answers.items():
        if isinstance(answer, Failure):
            findings.append(Finding("fail", "store read", node, answer.message))
            continue
        found = f"{answer / 1e6:.1f} MB/s"
        if need is not None:
            found += f" of {need / 1e6:.1f} MB/s that the run needs"
        short = need is not None and answer < need
        found += ": training would wait for data" if short else ""
        findings.append(Finding("fail" if short else "ok", "store read", node, found))
    return findings


def judge_free(check: str, answers: Answers[int], need: float, what: str) -> list[Finding]:
    """Free bytes of each node against ``need``."""
    findings = []
    for node, answer in answers.items():
        if isinstance(answer, Failure):
            findings.append(Finding("fail", check, node, answer.message))
            continue
        found = f"{describe_bytes(answer)} free, {describe_bytes(need)} needed for {what}"
        findings.append(Finding("ok" if answer >= need else "fail", check, node, found))
    return findings


def judge_gpus(answers: Answers[list[str]], expected: Mapping[str, int]) -> list[Finding]:
    """``expected``: GPUs of each node in Ray."""
    findings = []
    for node, answer in answers.items():
        if isinstance(answer, Failure):
            findings.append(Finding("fail", "gpu", node, answer.message))
            continue
        wanted = expected.get(node, 0)
        names = f"{len(answer)} x {answer[0]}" if answer else "none"
        right = len(answer) == wanted
        found = names if right else f"{names}, but Ray counts {wanted}"
        findings.append(Finding("ok" if right else "fail", "gpu", node, found))
    return findings


def judge_done(
    check: str, answers: Answers[Any], found: str, *, failure: Status = "fail", advice: str = ""
) -> list[Finding]:
    """A check that either works, as ``found`` says, or does not."""
    return [
        Finding(failure, check, node, answer.message + advice)
        if isinstance(answer, Failure)
        else Finding("ok", check, node, found)
        for node, answer in answers.items()
    ]


def judge_same(check: str, answers: Answers[str], what: str) -> list[Finding]:
    """Answers that must be equal on all nodes."""
    given = [answer for answer in answers.values() if not isinstance(answer, Failure)]
    usual = max(set(given), key=given.count) if given else ""
    return [
        Finding("fail", check, node, answer.message)
        if isinstance(answer, Failure)
        else Finding(
            "ok" if answer == usual else "fail",
            check,
            node,
            f"{what} {answer}" + ("" if answer == usual else f"; other nodes: {usual}"),
        )
        for node, answer in answers.items()
    ]


def describe(findings: list[Finding]) -> str:
    """The table: failures are marked at the beginning of the line."""
    rows = [(one.status, one.check, one.node, plain_text(one.found)) for one in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(row[at].ljust(widths[at]) for at in range(3)), row[3]]).rstrip()
        for row in rows
    ]
    failed = sum(one.status == "fail" for one in findings)
    lines.append(f"{failed} of {len(findings)} checks failed" if failed else "no check failed")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> dict[str, Any]:
    return {
        "ok": all(one.status != "fail" for one in findings),
        "checks": [asdict(one) for one in findings],
    }
