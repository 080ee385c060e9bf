"""When may a student's distribution be compared with a teacher's?

KL(p_T || p_S) compares probabilities id by id, so an id must mean the same token on both sides. The rule: every token
the student's tokenizer knows has the same id in the teacher's. The teacher may know more (Qwen3 over Qwen2.5 adds a
few), and both models may pad their embedding beyond their tokenizer; such ids are not shared, and
`generative.generative_losses` takes them out of both distributions. Sizes prove nothing: two models of 151,936 logits
can disagree, and two that agree on every token can be of different sizes.

It needs configs and tokenizers alone: call it before any weight is read, so that a wrong pair fails in seconds.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from distiller.records import InputError

NAMED_TOKENS = 5


class VocabularyMismatch(InputError):
    """The two vocabularies disagree on a token; the message names some and the way out."""


@dataclass(frozen=True)
class SharedVocabulary:
    """What student and teacher have in common.

    shared: (min(student, teacher) vocabulary size,) bool, True where the id is the same token of both.
    student_only: tokens of the student alone; always 0, since anything else is a mismatch.
    teacher_only: tokens of the teacher's tokenizer that the student does not have.
    """

    shared: torch.Tensor
    student_only: int
    teacher_only: int


def match_vocabularies(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_vocab_size: int,
    teacher_vocab_size: int,
) -> SharedVocabulary:
    """Check the rule above; the sizes are the models' numbers of logits, `config.get_text_config().vocab_size`.

    Raises VocabularyMismatch if a student token is missing in the teacher or has another id there, or if the id of a
    student token is beyond either model's logits.
    """
    student, teacher = (
        student_tokenizer.get_vocab(),
        teacher_tokenizer.get_vocab(),
    )  # token -> id, added tokens included
    for side, vocabulary, size in (("student", student, student_vocab_size), ("teacher", teacher, teacher_vocab_size)):
        beyond = {token: i for token, i in vocabulary.items() if i >= size and (side == "student" or token in student)}
        if beyond:
            raise VocabularyMismatch(
                f"the {side}'s tokenizer has {len(beyond)} tokens beyond its model's {size} logits: {_named(beyond)}. "
                "Tokenizer and model do not belong together; with an added token, resize the model's embedding first"
            )
    different = {token: i for token, i in student.items() if teacher.get(token) != i}
    if different:
        examples = [
            f"{token!r} is {different[token]} in the student and "
            + (f"{teacher[token]} in the teacher" if token in teacher else "missing in the teacher")
            for token in sorted(different, key=different.get)[:NAMED_TOKENS]
        ]
        raise VocabularyMismatch(
            f"{len(different)} of the student's {len(student)} tokens are not the teacher's: {'; '.join(examples)}"
            f"{'; ...' if len(different) > NAMED_TOKENS else ''}. Different tokens cannot be compared: "
            "choose a teacher of the student's family, or train without the KL term: --kl_weight 0"
        )
    shared = torch.zeros(min(student_vocab_size, teacher_vocab_size), dtype=torch.bool)
    shared[list(student.values())] = True
    return SharedVocabulary(shared=shared, student_only=0, teacher_only=len(teacher.keys() - student.keys()))


def _named(tokens: dict[str, int]) -> str:
    """A few tokens with their ids, the lowest first."""
    lowest = sorted(tokens, key=tokens.get)[:NAMED_TOKENS]
    return ", ".join(f"{token!r} = {tokens[token]}" for token in lowest) + (
        ", ..." if len(tokens) > len(lowest) else ""
    )
