"""Packs of answers: what is written is read, for the same target and length alone."""

import numpy as np
import pytest

from ppow_jax.corpus.answer_pack import prompt_key, read_packs, write_pack
from ppow_jax.data.encoding import Example
from ppow_jax.errors import UserError

ABOUT = {"target": "small", "max_new_tokens": 5}


def example(prompt, answer):
    tokens = np.array([*prompt, *answer], np.int32)
    return Example(tokens, np.arange(len(tokens)) >= len(prompt), "here")


def test_answers_come_back_by_prompt_and_once(tmp_path):
    first, second = [example([1, 2], [7]), example([3], [8, 9, 70000])], [example([1, 2], [7]), example([4, 4], [1])]
    assert write_pack(tmp_path / "a.npz", [*first, first[0]], ABOUT) == 2
    write_pack(tmp_path / "b.npz", second, ABOUT)
    found = read_packs([str(tmp_path / "a.npz"), str(tmp_path / "b.npz")], ABOUT)
    wanted = {(1, 2): [7], (3,): [8, 9, 70000], (4, 4): [1]}
    assert len(found) == 3
    for prompt, answer in wanted.items():
        np.testing.assert_array_equal(found[prompt_key(np.array(prompt, np.int64))], answer)
        assert found[prompt_key(np.array(prompt))].dtype == np.int32


@pytest.mark.parametrize("about", [{"target": "other"}, {"max_new_tokens": 6}])
def test_answers_made_otherwise_are_refused(tmp_path, about):
    write_pack(tmp_path / "a.npz", [example([1], [2])], ABOUT)
    (name, value), *_ = about.items()
    with pytest.raises(UserError, match=rf"a.npz: its answers were made with {name} {ABOUT[name]!r} \(now {value!r}\)"):
        read_packs([str(tmp_path / "a.npz")], ABOUT | about)


@pytest.mark.parametrize("content", [None, b"", b"not a pack", b"PK\x03\x04" + bytes(40)])
def test_a_file_that_is_no_pack_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "a.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match="--answers_from=.*a.npz: (cannot be read|is no answer pack)") as error:
        read_packs([str(path)], ABOUT)
    assert "\n" not in str(error.value)
