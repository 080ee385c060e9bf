"""Which teacher may a student's vocabulary be compared with."""

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from RewardTrainer.train.vocabulary import VocabularyMismatch, match_vocabularies


def tokenizer(*tokens, added=()):
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)})))
    fast.add_special_tokens({"additional_special_tokens": list(added)})
    return fast


def test_equal_vocabularies_share_every_id():
    found = match_vocabularies(tokenizer("a", "b"), tokenizer("a", "b"), 2, 2)
    assert found.shared.tolist() == [True, True]
    assert (found.student_only, found.teacher_only) == (0, 0)


def test_teacher_only_tokens_and_padding_ids_are_not_shared():
    student = tokenizer("a", "b", added=["<end>"])
    teacher = tokenizer("a", "b", added=["<end>", "<think>", "</think>"])  # 3, 4: padding in the student's model
    found = match_vocabularies(student, teacher, 6, 8)
    assert found.shared.tolist() == [True, True, True, False, False, False]
    assert found.teacher_only == 2


def test_teacher_with_fewer_padding_ids_shortens_the_mask():
    found = match_vocabularies(tokenizer("a", "b"), tokenizer("a", "b"), 8, 3)
    assert found.shared.tolist() == [True, True, False]


def test_token_with_another_id_is_refused_by_name_with_the_way_out():
    with pytest.raises(VocabularyMismatch, match="'b' is 1 in the student and 2 in the teacher.*--kl_weight 0"):
        match_vocabularies(tokenizer("a", "b"), tokenizer("a", "x", "b"), 3, 3)


def test_token_missing_in_the_teacher_is_refused_even_if_sizes_agree():
    with pytest.raises(VocabularyMismatch, match="1 of the student's 2 tokens.*'<own>' is 1.*missing in the teacher"):
        match_vocabularies(tokenizer("a", added=["<own>"]), tokenizer("a", "b"), 2, 2)


def test_wholly_different_vocabularies_name_only_a_few_tokens():
    names = [f"s{i}" for i in range(50)]
    with pytest.raises(VocabularyMismatch, match="50 of the student's 50") as error:
        match_vocabularies(tokenizer(*names), tokenizer(*[name.upper() for name in names]), 50, 50)
    assert len(str(error.value)) < 500


def test_tokenizer_larger_than_its_model_is_refused():
    with pytest.raises(VocabularyMismatch, match="student's tokenizer has 1 tokens beyond.*2 logits: '<new>' = 2"):
        match_vocabularies(tokenizer("a", "b", added=["<new>"]), tokenizer("a", "b", added=["<new>"]), 2, 3)
    with pytest.raises(VocabularyMismatch, match="teacher's tokenizer"):
        match_vocabularies(tokenizer("a", "b", added=["<new>"]), tokenizer("a", "b", added=["<new>"]), 3, 2)
