"""Findings from the metrics of a run that the student gets worse, in plain sentences.

A loss of pairs can fall while the student is ruined: it compares two responses, and both may become unlikely. So what
is watched is how likely the teacher's responses are, how far the student has left the one that sampled y_s, and, on
held-out prompts, whether its own responses still end.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean

from dpkd_offline.metrics.text import BROKEN

# Nats a token by which log q of held-out responses has fallen, or the loss risen where it is a distance itself: below
# the best validation, it is worth a word; below the one before training, or far below the best, the student is ruined.
UNLEARNED, BELOW_START, BELOW_BEST = 0.2, 0.5, 1.0
# Of log q below its start, where the loss is a distance and got smaller: by reverse KL students of 12 layers came to
# say little but "the" and "a", 2.3 and 3.2 nats below; one of 18 layers, 0.3 below, had got better.
LEFT_OUT = 1.5
DRIFT = 2.0  # nats a token between the student and the one that sampled y_s; near again below half of it
WINDOW = 8  # steps whose mean is compared
# Steps in which no pair is in the right order, or every one from the first on. A student that is far from its teacher
# begins with none, and may need dozens of steps: it is stuck where the margin has not risen by a tenth, or where
# something else says that it goes wrong; and in so many steps it is not on its way.
STUCK, STUCK_AND_WORSE, NOT_ON_ITS_WAY = 24, 2 * WINDOW, 100
ON_ITS_WAY = 0.1
# Of Rouge-L before training, what is left where it has got worse; and by how many standard errors of the difference, as
# if the prompts were others each time. They are the same, so that noise is smaller than that.
ROUGE_LEFT, ROUGE_ERRORS = 2 / 3, 1.5
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

    Its findings are a function of these lines, so that a resumed run has those of one that was never stopped.
    """

    def __init__(self, loss_of_pairs: bool, loss_measures: bool = False) -> None:
        """
        Args:
            loss_of_pairs: whether the loss compares two responses, so that it may fall while both become unlikely.
            loss_measures: whether the loss says itself how far the student is from what it is taught. A student that
                learns by reverse KL leaves unlikely responses of the teacher on purpose, and log q of them may fall
                a little.
        """
        self._of_pairs, self._by_loss = loss_of_pairs, loss_measures
        self._watched = "the loss of held-out prompts" if loss_measures else "log q of held-out responses"
        self._advice = f"{LOWER_RATE} {ANCHOR}" if loss_of_pairs else LOWER_RATE
        self._start: Mapping[str, float] = {}  # the validation before training
        self._best: Mapping[str, float] = {}  # the one with the likeliest responses
        self._first_steps: list[Mapping[str, float]] = []
        self._last_steps: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._drifts: deque[float] = deque(maxlen=WINDOW)  # of the last steps, since the drift was measured as such
        self._active: set[str] = set()  # findings that still hold
        self._none_right = self._all_right = 0  # steps in a row with accuracy 0, and with 1
        self._always_right = True
        self._margins: list[float] = []  # of these steps, since the end of the warm-up
        self._last_rate = 0.0
        self.findings: list[Finding] = []

    @property
    def ruined(self) -> bool:
        """Whether the last validation found the student worse than it was."""
        return "ruined" in self._active

    def read(self, line: Mapping[str, float]) -> list[Finding]:
        """The findings that a line of metrics brings: what holds now and did not before."""
        checks: Iterator[tuple[str, str]] = iter(())
        if "val_logps_chosen" in line:
            checks = self._validation_checks(line)
        elif "drift_kl_token" in line:
            self._drifts.clear()  # perhaps another round of y_s has begun
            checks = iter([("drift", self._is_far(line["drift_kl_token"]))])
        elif "loss" in line and "logps_chosen" in line:
            checks = self._step_checks(line)
        new = []
        for name, sentence in checks:
            if sentence and name not in self._active:
                new.append(Finding(int(line["step"]), sentence, name == "ruined"))
            (self._active.add if sentence else self._active.discard)(name)
        self.findings += new
        return new

    def _step_checks(self, line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Names of what a step may say, each with a sentence where it does, and an empty one where it does not."""
        self._last_steps.append(line)
        if "drift" in line:
            self._drifts.append(line["drift"])
            if len(self._drifts) >= WINDOW // 2:
                yield "drift", self._is_far(fmean(self._drifts))
        if self._of_pairs and "accuracy" in line:
            yield from self._order(line)
        if len(self._first_steps) < WINDOW:
            self._first_steps.append(line)
            return
        yield "unlearns in training", self._unlearns()

    def _is_far(self, drift: float) -> str:
        if drift <= (DRIFT / 2 if "drift" in self._active else DRIFT):
            return ""
        return (
            f"the student is {drift:.1f} nats a token away from the one that sampled y_s, and these responses say "
            f"little about it any more; {ANEW}, or {LOWER_RATE}"
        )

    def _unlearns(self) -> str:
        """Of pairs the likelihood of y_t counts, of other objectives what they minimise."""
        before, now = (
            {name: fmean(step[name] for step in steps) for name in ("loss", "logps_chosen")}
            for steps in (self._first_steps, self._last_steps)
        )
        losses = f"from {before['loss']:.3g} to {now['loss']:.3g}"
        if self._by_loss and now["loss"] > before["loss"] + BELOW_START:
            return f"the loss rose {losses} nats a token; {self._advice}"
        fell = now["loss"] < before["loss"]
        lost, worth_a_word = before["logps_chosen"] - now["logps_chosen"], BELOW_START if fell else BELOW_BEST
        if not self._of_pairs or lost < worth_a_word:
            return ""
        of_loss = f"the loss fell {losses}, but log q(y_t) fell too" if fell else "log q(y_t) fell"
        return (
            f"{of_loss}, from {before['logps_chosen']:.2f} to {now['logps_chosen']:.2f} nats a token: the student "
            f"unlearns the teacher's responses; {self._advice}"
        )

    def _order(self, line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Whether pairs stay in the wrong order, or were never in it."""
        accuracy, margin, rate = line["accuracy"], line.get("margin", 0.0), line.get("learning_rate", 0.0)
        warming_up, self._last_rate = rate > self._last_rate, rate
        self._none_right = 0 if accuracy > 0 else self._none_right + 1
        self._always_right &= accuracy == 1
        self._all_right += self._always_right
        if self._none_right <= 1 or warming_up:
            self._margins = []
            self._none_right = min(self._none_right, 1)
        self._margins.append(margin)
        first, last = fmean(self._margins[:WINDOW]), fmean(self._margins[-WINDOW:])
        needed = NOT_ON_ITS_WAY if last > first + ON_ITS_WAY * abs(first) else STUCK
        if "none right" in self._active:
            needed = 1  # it is said once, until a pair is right
        elif self._active & {"drift", "unlearns in training", "unlearns", "ruined"}:
            needed = STUCK_AND_WORSE
        yield (
            "none right",
            f"in {self._none_right} steps in a row no pair had a larger reward for y_t than for y_s (accuracy 0), the "
            f"margin went from {first:.3g} to {last:.3g}: the student does not learn what the pairs are "
            f"to teach; teach it y_t first (--objective seqkd), or take another --learning-rate"
            if self._none_right >= needed
            else "",
        )
        yield (
            "all right",
            f"in all of the first {self._all_right} steps every pair had a larger reward for y_t than for y_s "
            f"(accuracy 1): there is little to learn from them; see whether y_s are those of this student"
            if self._always_right and self._all_right >= STUCK
            else "",
        )

    def _validation_checks(self, line: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """The same of a validation."""
        self._start = self._start or line
        if not self._best or self._gain(self._best, line) > 0:
            self._best = line
        now, best = self._value(line), self._value(self._best)
        of_loss, broken = "", self._broken(line)
        if self._of_pairs and line["val_loss_kd"] < self._best["val_loss_kd"]:
            of_loss = f"the loss of held-out pairs fell to {line['val_loss_kd']:.3g}, but "
        yield (
            "unlearns",
            f"{of_loss}{self._watched} {'rose' if self._by_loss else 'fell'} from {best:.2f} to {now:.2f} nats a "
            f"token: the student unlearns what it was taught; {self._advice}"
            if self._gain(line, self._best) > UNLEARNED
            else "",
        )
        better = f", although {self._watched} got better" if self._gain(self._start, line) > 0 else ""
        yield "broken", f"{broken}{better}; {self._advice}" if broken else ""
        rouge = self._lost_rouge(line)
        yield "rouge", f"{rouge}{better}; {self._advice}" if rouge else ""
        yield "ruined", self._ruin(line, broken=bool(broken))

    def _ruin(self, line: Mapping[str, float], *, broken: bool) -> str:
        """How a validation shows that the student is worse than it was; empty where it does not."""
        now, start, best = (self._value(of) for of in (line, self._start, self._best))
        lost, lost_since_start = self._gain(line, self._best), self._gain(line, self._start)
        if lost_since_start > BELOW_START or lost > (UNLEARNED if broken else BELOW_BEST):
            return (
                f"the student got worse: {self._watched} is {now:.2f} nats a token, before training it was "
                f"{start:.2f}, and after step {int(self._best['step'])} {best:.2f}"
            )
        logps, before = line["val_logps_chosen"], self._start["val_logps_chosen"]
        if before - logps > LEFT_OUT:  # only where it is not what is watched
            return (
                f"the student got worse: log q of held-out responses is {logps:.2f} nats a token, before training it "
                f"was {before:.2f}: it leaves out what the teacher says, although {self._watched} went from "
                f"{start:.2f} to {now:.2f}"
            )
        return ""

    def _lost_rouge(self, line: Mapping[str, float]) -> str:
        """Whether Rouge-L is far below that before training, where it is measured; empty where it is not."""
        if "val_rouge_l_error" not in line or "val_rouge_l_error" not in self._start:
            return ""
        before, now = self._start["val_rouge_l"], line["val_rouge_l"]
        error = math.hypot(self._start["val_rouge_l_error"], line["val_rouge_l_error"])
        if now >= ROUGE_LEFT * before or before - now <= ROUGE_ERRORS * error:
            return ""
        return f"Rouge-L of its responses fell from {before:.1f} to {now:.1f}"

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
