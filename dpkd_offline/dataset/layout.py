"""The kinds of tables, described once: where each lies in a dataset's folder, what a row is, which command makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic

from dpkd_offline.dataset.schema import PreferencePair, Prompt, R, Response, TopK

SAMPLES = "samples"  # the folder of what further responses to the same prompts have


@dataclass(frozen=True)
class TableKind(Generic[R]):
    """A kind of table. A dataset has one of it, or one of each round; of some kinds one for each student, and for each
    sample, which is a response to every prompt."""

    name: str  # what `load_dataset` calls it
    record: type[R]
    folder: str
    rounds: bool  # whether each round has one, in a folder of its own
    of_student: bool  # whether each student has one: that of a further student lies below students/NAME
    samples: bool  # whether each sample has one: those after the first lie below samples/NNN
    command: str  # that makes it
    meaning: str  # what a row is, for people

    @property
    def stem(self) -> str:
        """What the names of its shards begin with."""
        return self.folder.split("/")[0]

    def home(self, student: str | None = None, sample: int = 0) -> str:
        """The folder, in the dataset's, of a student's table of this kind; or of its tables, one of each round."""
        of_sample = f"{SAMPLES}/{sample:03d}/" if self.samples and sample else ""
        return of_sample + (f"students/{student}/" if self.of_student and student is not None else "") + self.folder

    def path(self, student: str | None = None, round: int | None = None, sample: int = 0) -> str:
        """The folder of the table of a student, a round and a sample; what the kind does not have is left out."""
        return self.home(student, sample) + (f"/round-{round:03d}" if self.rounds else "")


PROMPTS = TableKind(
    "prompts",
    Prompt,
    folder="prompts",
    rounds=False,
    of_student=False,
    samples=False,
    command="generate",
    meaning="x: messages, the text after the template, its tokens, and good answers where known",
)
TEACHER_PROMPTS = TableKind(
    "teacher_prompts",
    Prompt,
    folder="prompts/teacher",
    rounds=False,
    of_student=False,
    samples=False,
    command="generate",
    meaning="x as a teacher sees it that is told more than the students: y_t is sampled and both are scored behind it",
)
STUDENT_PROMPTS = TableKind(
    "student_prompts",
    Prompt,
    folder="prompts/student",
    rounds=False,
    of_student=True,
    samples=False,
    command="generate",
    meaning="x as a student sees it that has another tokenizer, or another template",
)
TEACHER_RESPONSES = TableKind(
    "teacher_responses",
    Response,
    folder="responses/teacher",
    rounds=False,
    of_student=False,
    samples=True,
    command="generate",
    meaning="y_t, sampled from the teacher",
)
STUDENT_RESPONSES = TableKind(
    "student_responses",
    Response,
    folder="responses/student",
    rounds=True,
    of_student=True,
    samples=True,
    command="generate",
    meaning="y_s, sampled from the student, with the student's log-probs",
)
PAIRS = TableKind(
    "pairs",
    PreferencePair,
    folder="pairs",
    rounds=True,
    of_student=True,
    samples=True,
    command="score-teacher",
    meaning="all that `train` reads: x, y_t, y_s, and the teacher's log p of each of their tokens",
)
TOP_K = TableKind(
    "top_k",
    TopK,
    folder="top_k",
    rounds=True,
    of_student=True,
    samples=True,
    command="score-teacher --top-k",
    meaning="the teacher's likeliest tokens at each position of y_t and y_s",
)
# In the order in which they are made: each is made of those before it.
KINDS: tuple[TableKind[Any], ...] = (
    PROMPTS,
    TEACHER_PROMPTS,
    STUDENT_PROMPTS,
    TEACHER_RESPONSES,
    STUDENT_RESPONSES,
    PAIRS,
    TOP_K,
)
