"""What in the numbers of a run says that the student gets worse, in plain sentences.

A loss of pairs can fall while the student is ruined: it compares two responses, and both may become unlikely. So what
is watched is how likely the teacher's responses are, how far the student has left the one that sampled y_s, and, on
held-out prompts, whether its own responses still end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

# Nats a token by which log q of stored responses has fallen: below the best validation, it is worth a word; below the
# one before training, or far below the best, the student is ruined.
UNLEARNED, BELOW_START, BELOW_BEST = 0.2, 0.5, 1.0
BROKEN = 0.4  # so much more of the responses than before training are cut off, or of a response said before
DRIFT = 2.0  # nats a token between the student and the one that sampled y_s
WINDOW = 8  # steps whose mean is compared

LOWER_RATE = "take a lower --learning-rate"
ANCHOR = "or a larger --chosen-nll-weight"
ANEW = "let the student answer anew (--regenerate-every, or `regenerate` in a recipe)"


@dataclass(frozen=True)
class Finding:
    """Something that a person should hear about, at the step where it begins."""

    step: int
    sentence: str
    ruined: bool = False  # the student is worse than it was, beyond noise


class Health:
    """Reads the lines of a run's metrics in their order.

    What it says is a function of these lines, so that a run that goes on says the same as one that was never stopped.
    """

    def __init__(self, loss_of_pairs: bool) -> None:
        """`loss_of_pairs`: whether the loss compares two responses, so that it may fall while both become unlikely."""
        self._of_pairs = loss_of_pairs
        self._advice = f"{LOWER_RATE} {ANCHOR}" if loss_of_pairs else LOWER_RATE
        self._start: Mapping[str, float] = {}  # the validation before training
        self._best: Mapping[str, float] = {}  # the one with the likeliest responses
        self._first_steps: list[Mapping[str, float]] = []
        self._last_steps: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._holding: set[str] = set()  # what has been said, and is still so
        self.findings: list[Finding] = []

    @property
    def ruined(self) -> bool:
        """Whether the last validation found the student worse than it was."""
        return "ruined" in self._holding

    def read(self, line: Mapping[str, float]) -> list[Finding]:
        """What a line says that was not so before it."""
        checks: Iterator[tuple[str, str]] = iter(())
        if "val_logps_chosen" in line:
            checks = self._of_validation(line)
        elif "loss" in line and "logps_chosen" in line:
            checks = self._of_step(line)
        new = []
        for name, sentence in checks:
            if sentence and name not in self._holding:
                new.append(Finding(int(line["step"]), sentence, name == "ruined"))
            (self._holding.add if sentence else self._holding.discard)(name)
        self.findings += new
        return new

    def _of_step(self, line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """What a step says: a name, and a sentence where it is so."""
        self._last_steps.append(line)
        if len(self._first_steps) < WINDOW:
            self._first_steps.append(line)
            return
        if self._of_pairs:
            yield "unlearns in training", self._unlearns()
        if drifts := [step["drift"] for step in self._last_steps if "drift" in step]:
            far = fmean(drifts)
            yield (
                "drift",
                f"the student is {far:.1f} nats a token away from the one that sampled y_s, and these responses say "
                f"little about it any more; {ANEW}, or {LOWER_RATE}"
                if far > DRIFT
                else "",
            )

    def _unlearns(self) -> str:
        before, now = (
            {name: fmean(step[name] for step in steps) for name in ("loss", "logps_chosen")}
            for steps in (self._first_steps, self._last_steps)
        )
        if now["loss"] >= before["loss"] or now["logps_chosen"] > before["logps_chosen"] - BELOW_START:
            return ""
        return (
            f"the loss fell from {before['loss']:.3g} to {now['loss']:.3g}, but log q(y_t) fell too, from "
            f"{before['logps_chosen']:.2f} to {now['logps_chosen']:.2f} nats a token: the student unlearns the "
            f"teacher's responses; {self._advice}"
        )

    def _of_validation(self, line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """What a validation says: a name, and a sentence where it is so."""
        likely = line["val_logps_chosen"]
        self._start = self._start or line
        if not self._best or likely > self._best["val_logps_chosen"]:
            self._best = line
        start, best = self._start["val_logps_chosen"], self._best["val_logps_chosen"]
        of_loss, broken = "", self._broken(line)
        if self._of_pairs and line["val_loss_kd"] < self._best["val_loss_kd"]:
            of_loss = f"the loss of held-out pairs fell to {line['val_loss_kd']:.3g}, but "
        yield (
            "unlearns",
            f"{of_loss}log q of held-out responses fell from {best:.2f} to {likely:.2f} nats a token: the student "
            f"unlearns them; {self._advice}"
            if best - likely > UNLEARNED
            else "",
        )
        yield "broken", f"{broken}; {self._advice}" if broken else ""
        ruined = start - likely > BELOW_START or best - likely > (UNLEARNED if broken else BELOW_BEST)
        yield (
            "ruined",
            f"the student got worse: log q of held-out responses is {likely:.2f} nats a token, before training it was "
            f"{start:.2f}, and after step {int(self._best['step'])} {best:.2f}"
            if ruined
            else "",
        )

    def _broken(self, line: Mapping[str, float]) -> str:
        """What is wrong with the form of responses that was not before training; empty where nothing is."""
        sentences = {
            "cut_off": "responses no longer end: {:.0%} of them are cut off, before training {:.0%}",
            "repetition": "responses repeat themselves: {:.0%} of one stood in it before, before training {:.0%}",
        }
        for name, sentence in sentences.items():
            if f"val_{name}" in line and f"val_{name}" in self._start:
                now, before = line[f"val_{name}"], self._start[f"val_{name}"]
                if now > max(before, line[f"val_{name}_chosen"]) + BROKEN:
                    return sentence.format(now, before)
        return ""
