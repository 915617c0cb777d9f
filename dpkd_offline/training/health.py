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

from dpkd_offline.metrics.text import BROKEN

# Nats a token by which log q of held-out responses has fallen, or the loss risen where it is a distance itself: below
# the best validation, it is worth a word; below the one before training, or far below the best, the student is ruined.
UNLEARNED, BELOW_START, BELOW_BEST = 0.2, 0.5, 1.0
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

    def __str__(self) -> str:
        return f"step {self.step}: {self.sentence}"


class Health:
    """Reads the lines of a run's metrics in their order.

    What it says is a function of these lines, so that a run that goes on says the same as one that was never stopped.
    """

    def __init__(self, loss_of_pairs: bool, loss_measures: bool = False) -> None:
        """
        Args:
            loss_of_pairs: whether the loss compares two responses, so that it may fall while both become unlikely.
            loss_measures: whether the loss says itself how far the student is from what it is taught. A student that
                learns by reverse KL leaves unlikely responses of the teacher on purpose, and log q of them may fall.
        """
        self._of_pairs, self._by_loss = loss_of_pairs, loss_measures
        self._watched = "the loss of held-out prompts" if loss_measures else "log q of held-out responses"
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
        self._start = self._start or line
        if not self._best or self._gain(self._best, line) > 0:
            self._best = line
        now, start, best = (self._value(of) for of in (line, self._start, self._best))
        of_loss, broken = "", self._broken(line)
        if self._of_pairs and line["val_loss_kd"] < self._best["val_loss_kd"]:
            of_loss = f"the loss of held-out pairs fell to {line['val_loss_kd']:.3g}, but "
        lost, lost_since_start = self._gain(line, self._best), self._gain(line, self._start)
        yield (
            "unlearns",
            f"{of_loss}{self._watched} {'rose' if self._by_loss else 'fell'} from {best:.2f} to {now:.2f} nats a "
            f"token: the student unlearns what it was taught; {self._advice}"
            if lost > UNLEARNED
            else "",
        )
        yield "broken", f"{broken}; {self._advice}" if broken else ""
        yield (
            "ruined",
            f"the student got worse: {self._watched} is {now:.2f} nats a token, before training it was {start:.2f}, "
            f"and after step {int(self._best['step'])} {best:.2f}"
            if lost_since_start > BELOW_START or lost > (UNLEARNED if broken else BELOW_BEST)
            else "",
        )

    def _value(self, line: Mapping[str, float]) -> float:
        return line["val_loss_kd" if self._by_loss else "val_logps_chosen"]

    def _gain(self, before: Mapping[str, float], after: Mapping[str, float]) -> float:
        """By how many nats a token a validation is better than another."""
        gain = self._value(after) - self._value(before)
        return -gain if self._by_loss else gain

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
