"""A language small enough to list, and the probabilities a table of logits gives to its strings."""

import itertools

import attrs
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@attrs.frozen(eq=False)
class Language:
    """All strings of at most ``length`` tokens out of ``vocab``; with ``eos``, a string ends at its first one.

    A prefix of t tokens is numbered V^0 + ... + V^(t-1) + (its tokens as the digits of a base-V number), so that the
    empty one is 0 and the numbers grow with the length. A policy is logits [states, vocab]: one row per prefix,
    whether or not a string ever passes through it.
    """

    vocab: int
    length: int
    eos: int | None
    tokens: Int64[Tensor, "strings time"]
    """Token ids; 0 behind the end."""
    prefixes: Int64[Tensor, "strings time"]
    """The number of the prefix each token was chosen after; 0 behind the end."""
    mask: Bool[Tensor, "strings time"]
    """True where there is a token, the end-of-sequence token included."""

    @classmethod
    def of(cls, vocab: int, length: int, eos: int | None = None) -> "Language":
        """List the strings in lexical order."""
        strings = []
        for string in itertools.product(range(vocab), repeat=length):
            end = string.index(eos) + 1 if eos in string else length
            if not any(string[end:]):  # of all continuations behind the end, keep the one made of zeros
                strings.append((string, end))
        tokens = torch.tensor([string for string, _ in strings])
        ends = torch.tensor([end for _, end in strings])
        mask = torch.arange(length) < ends[:, None]
        prefixes, number, first = [], torch.zeros(len(strings), dtype=torch.int64), 0
        for t in range(length):
            prefixes.append(first + number)
            number = number * vocab + tokens[:, t]
            first += vocab**t
        return cls(vocab, length, eos, tokens, torch.where(mask, torch.stack(prefixes, 1), 0), mask)

    @property
    def strings(self) -> int:
        """How many strings there are."""
        return len(self.tokens)

    @property
    def states(self) -> int:
        """How many prefixes a string can still be continued from: the rows of a policy."""
        return sum(self.vocab**t for t in range(self.length))

    def table(self, generator: torch.Generator, scale: float = 1.0) -> Float[Tensor, "states vocab"]:
        """Random logits."""
        return scale * torch.randn(self.states, self.vocab, dtype=torch.float64, generator=generator)


def token_logprobs(language: Language, logits: Float[Tensor, "states vocab"]) -> Float[Tensor, "strings time"]:
    """log pi(y_t | y_<t) of every token of every string; 0 behind the end."""
    chosen = logits.log_softmax(-1)[language.prefixes, language.tokens]
    return torch.where(language.mask, chosen, 0.0)


def string_logprobs(language: Language, logits: Float[Tensor, "states vocab"]) -> Float[Tensor, "strings"]:
    """log pi(y) of every string. Their exponentials sum to 1."""
    return token_logprobs(language, logits).sum(-1)


def objective(
    language: Language,
    logits: Float[Tensor, "states vocab"],
    ref_logits: Float[Tensor, "states vocab"],
    scores: Float[Tensor, "strings"],
    beta: float,
) -> Float[Tensor, ""]:
    """J(pi) = sum_y pi(y) (r(y) - beta log(pi(y) / ref(y)))."""
    logprobs = string_logprobs(language, logits)
    return (logprobs.exp() * (scores - beta * (logprobs - string_logprobs(language, ref_logits)))).sum()


def kl_divergence(
    language: Language, logits: Float[Tensor, "states vocab"], other: Float[Tensor, "states vocab"]
) -> Float[Tensor, ""]:
    """KL(pi || other) = sum_y pi(y) log(pi(y) / other(y)) over whole strings."""
    logprobs = string_logprobs(language, logits)
    return (logprobs.exp() * (logprobs - string_logprobs(language, other))).sum()
