"""What several responses to one prompt have in common, which a model need not compute, nor score, for each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences have in common before they differ, or one of them ends."""
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length


class ResponseTree:
    """Responses to one prompt, each asked about from where it parts from the others.

    The longest comes first. Another one has the numbers of the tokens that it shares with an earlier one from there,
    and so that of the token in which it differs, whose position both share: it is one more id to score there. What is
    left is behind everything that an earlier response has, so that no cache of prefixes can hold a row of it.
    """

    def __init__(self, responses: Sequence[Sequence[int]]) -> None:
        """No response is empty."""
        self._lengths = [len(response) for response in responses]
        self._parents: dict[int, tuple[int, int, int]] = {}  # which one, tokens shared, place of the next among the ids
        self.asked: dict[int, tuple[int, list[list[int]]]] = {}
        """By response, in the order to ask in: its first token that is scored, and from there on the ids to score at
        each. The first of these is the response's own. Those that nothing is left of are not asked about."""
        for n in sorted(range(len(responses)), key=lambda n: -self._lengths[n]):
            response, parent, shared = responses[n], -1, -1
            for other in self._parents:
                if (common := common_prefix(response, responses[other])) > shared:
                    parent, shared = other, common
            place = 0
            if 0 <= shared < len(response):
                # The earliest response with so much in common is asked about this token; others have it from that one.
                first, ids = self.asked[parent]
                place = len(ids[shared - first])
                ids[shared - first].append(response[shared])
            self._parents[n] = parent, shared, place
            if shared + 1 < len(response):
                self.asked[n] = shared + 1, [[token] for token in response[shared + 1 :]]

    def scores(self, answers: Mapping[int, Sequence[Sequence[float]]]) -> list[list[float]]:
        """The log-probs of all responses, from those of the ids that were asked for of each response in `asked`."""
        logps: dict[int, list[float]] = {}
        for n, (parent, shared, place) in self._parents.items():
            own = [float(row[0]) for row in answers.get(n, ())]
            if 0 <= shared < self._lengths[n]:
                own = [float(answers[parent][shared - self.asked[parent][0]][place]), *own]
            logps[n] = logps[parent][:shared] + own if shared > 0 else own
        return [logps[n] for n in range(len(self._lengths))]
