"""Prompts as tokens: tokenized once, for one model; one start token, in a chat too; unusable ones told by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import llvlit
from conftest import ARCHITECTURES, EXACT, PROMPTS, byte_tokenizer, tiny_model
from llvlit.engine.depth import last_token_states, sweep
from llvlit.engine.models import LanguageModel, wrap_model
from llvlit.engine.tokens import TokenizedPrompts, tokenize, usable_prompts
from llvlit.errors import InputError, ModelError
from llvlit.method.concepts import random_directions
from llvlit.prompts import Prompts


def test_tokens_take_the_place_of_prompts(gpt2: LanguageModel) -> None:
    tokens = tokenize(gpt2, PROMPTS, max_tokens=8)
    assert tokens.prompts == PROMPTS and tokens.n_cut == 5
    expected = last_token_states(gpt2, PROMPTS, max_tokens=8)
    assert torch.equal(last_token_states(gpt2, tokens, max_tokens=8), expected)
    system = llvlit.depth_system(gpt2, tokens, max_tokens=8)
    assert torch.equal(system.states, expected) and system.n_cut == 5
    assert [layer.index for layer in sweep(gpt2, tokens, max_tokens=8)] == [0, 1, 2, 3]


def test_selected_tokens_are_those_of_selected_prompts(gpt2: LanguageModel) -> None:
    tokens = tokenize(gpt2, PROMPTS, max_tokens=8)
    for indices in ([4, 0], np.array(PROMPTS.labels) == 1, np.array([-1])):
        assert tokens.select(indices) == tokenize(gpt2, PROMPTS.select(indices), max_tokens=8)
    with pytest.raises(InputError, match="below 6"):
        tokens.select([6])


def test_tokens_of_another_model_or_length_are_refused(gpt2: LanguageModel) -> None:
    tokens = tokenize(gpt2, PROMPTS)
    with pytest.raises(InputError, match="tokenized for another model than tiny-gpt2"):
        llvlit.depth_system(tiny_model("gpt2", seed=1), tokens)
    with pytest.raises(InputError, match="max_tokens=128, and max_tokens=16 is asked for"):
        llvlit.depth_system(gpt2, tokens, max_tokens=16)


def test_identity_covers_weights_configuration_and_tokenizer(gpt2: LanguageModel) -> None:
    same = wrap_model(gpt2.module, gpt2.tokenizer, name="another name")
    assert same.identity == gpt2.identity
    gpt2.tokenizer("a text", truncation=True, max_length=2)
    assert replace(same).identity == gpt2.identity
    others = [tiny_model("gpt2", seed=1), tiny_model("gpt2", activation_function="relu"), tiny_model("gpt2")]
    others[2].tokenizer.add_tokens(["film"])
    assert others[2].fingerprint == gpt2.fingerprint
    assert len({other.identity for other in others} | {gpt2.identity}) == 4


def in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.7)


def by_new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.7


@pytest.mark.parametrize("change", [in_place, by_new_data])
def test_changed_weights_are_another_model(change: Callable[[nn.Parameter], None]) -> None:
    model = tiny_model("gpt2")
    directions = random_directions(model.n_layers + 1, model.hidden_size)
    tokens, before = tokenize(model, PROMPTS), model.identity
    first = llvlit.measured_gains(model, tokens, directions)
    change(model.layers[2].mlp.c_fc.weight)
    now = wrap_model(model.module, model.tokenizer)
    second = llvlit.measured_gains(model, PROMPTS, directions)
    assert second.metadata["model_fingerprint"] == now.fingerprint != first.metadata["model_fingerprint"]
    assert model.identity == now.identity != before
    with pytest.raises(InputError, match="tokenized for another model"):
        llvlit.measured_gains(model, tokens, directions)


def test_prompts_of_one_token_are_named_or_left_out(gpt2: LanguageModel) -> None:
    prompts = Prompts(["a film", "a", "", "a film too"], [1, 0, 1, 0])
    with pytest.raises(InputError, match=r"texts\[1\]='a' has fewer than two tokens"):
        tokenize(gpt2, prompts)
    tokens, left_out = usable_prompts(gpt2, prompts)
    assert tokens == tokenize(gpt2, prompts.select([0, 3]))
    assert left_out == {"fewer than two tokens": (1, 2)}
    with pytest.raises(InputError, match="None of the 1 prompts can be used"):
        usable_prompts(gpt2, Prompts(["a"], [1]))


def test_prompts_that_are_equal_after_cutting_are_named_or_left_out(gpt2: LanguageModel) -> None:
    texts = ["a good film", "a long film", "one good film", "a bad film", "the bad film", "good"]
    prompts = Prompts(texts, [1, 0, 1, 1, 0, 1])
    with pytest.raises(InputError, match=r"texts\[2\]='one good film' has the same tokens as an earlier prompt"):
        tokenize(gpt2, prompts.select([0, 1, 2]), max_tokens=9)
    with pytest.raises(InputError, match=r"texts\[0\]='a bad film' .* other label \(texts\[1\]='the bad film'\)"):
        tokenize(gpt2, prompts.select([3, 4]), max_tokens=9)
    tokens, left_out = usable_prompts(gpt2, prompts, max_tokens=9)
    assert tokens.prompts == prompts.select([0, 1, 5])
    assert sorted(left_out.values()) == [(2,), (3, 4)]
    assert usable_prompts(gpt2, prompts) == (tokenize(gpt2, prompts), {})


def test_texts_passed_twice_are_taken_twice(gpt2: LanguageModel) -> None:
    assert len(tokenize(gpt2, Prompts(["a film", "a film"], [1, 1]), max_tokens=3)) == 2


# The start token

TURNS = (
    "{% for message in messages %}{{ '<turn>' + message['role'] + ': ' + message['content'] | trim + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model: ' }}{% endif %}"
)
CHAT = "{{ bos_token }}" + TURNS


def marked(model: LanguageModel, frame: str = "$A", *, template: str | None = None, bos: str | None = "<s>"):
    """The model with a tokenizer that puts tokens around a text as the frame says, and has a chat template."""
    backend = byte_tokenizer().backend_tokenizer
    special = ["<s>", "</s>", "<mask>", "<turn>", "<end>"]
    backend.add_special_tokens(special)
    pairs = [(token, backend.token_to_id(token)) for token in special]
    backend.post_processor = TemplateProcessing(single=frame, special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>")
    tokenizer.chat_template = template
    return wrap_model(model.module, tokenizer, name="marked")


def written(model: LanguageModel, *texts: str, chat: bool = False, max_tokens: int = 128) -> list[str]:
    """The tokens of some texts, spelled out."""
    tokens = tokenize(model, Prompts(texts, [0] * len(texts)), chat=chat, max_tokens=max_tokens)
    return [model.tokenizer.decode(list(ids)) for ids in tokens.ids]


@pytest.mark.parametrize("text", ["a film", "<s>a film", "<s><s>a film"])
def test_one_start_token_where_the_tokenizer_wants_one(gpt2: LanguageModel, text: str) -> None:
    assert written(marked(gpt2, "<s> $A"), text) == ["<s>a film"]
    assert written(marked(gpt2, "<s> <s> $A"), text) == ["<s>a film"]
    assert written(marked(gpt2, "<s> $A </s>"), text) == ["<s>a film</s>"]
    assert written(marked(gpt2, "<mask> <s> $A"), "a film") == ["<mask><s>a film"]


def test_no_start_token_where_the_tokenizer_wants_none(gpt2: LanguageModel) -> None:
    for model in (marked(gpt2), marked(gpt2, bos=None)):
        assert written(model, "a film", "<s>a film") == ["a film", "<s>a film"]
        assert tokenize(model, PROMPTS).start_token == ""
    assert written(marked(gpt2, "$A </s>"), "a film") == ["a film</s>"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("wanted", [True, False])
def test_a_tokenizer_from_gguf_gets_the_start_token_that_its_file_asks_for(
    gpt2: LanguageModel, kind: str, wanted: bool, tmp_path: Path
) -> None:
    gguf = pytest.importorskip("gguf")
    space = {"llama": "\u2581", "gpt2": "\u0120"}[kind]
    letters = [space, "a", "b", f"{space}a"]
    writer = gguf.GGUFWriter(str(tmp_path / "tiny.gguf"), "llama")
    for name, value in (
        *(("context_length", 64), ("embedding_length", 8), ("block_count", 1), ("feed_forward_length", 8)),
        *(("head_count", 2), ("layer_norm_rms_eps", 1e-5), ("rope_dimension_count", 4), ("vocab_size", 7)),
        *(("tokenizer_model", kind), ("token_list", ["<unk>", "<s>", "</s>", *letters])),
        *(("token_scores", [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0]), ("token_types", [2, 3, 3, 1, 1, 1, 1])),
        *(("token_merges", [f"{space} a"]), ("bos_token_id", 1), ("eos_token_id", 2), ("add_bos_token", wanted)),
    ):
        getattr(writer, f"add_{name}")(value)
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()
    model = wrap_model(gpt2.module, AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf"))
    for text in ("a b a b", "<s>a b a b"):
        ids = tokenize(model, Prompts([text], [1])).ids[0]
        assert ids.count(1) == (ids[0] == 1) == (wanted or text.startswith("<s>"))


def test_a_cut_prompt_keeps_its_start_token(gpt2: LanguageModel) -> None:
    model = marked(gpt2, "<s> $A")
    assert written(model, "a long film", max_tokens=5) == ["<s>film"]
    tokens = tokenize(model, Prompts(["film", "a long film", "long"], [1, 1, 0]), max_tokens=6)
    assert tokens.is_cut == (False, True, False) and tokens.start_token == "<s>"
    assert str(tokens) == "3 prompts; start token '<s>'; 1 cut on the left to 6 tokens"
    with pytest.raises(InputError, match="max_tokens=2 is not between 3 and the context"):
        tokenize(marked(gpt2, "<mask> <s> $A"), PROMPTS, max_tokens=2)


# The token that is read


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_a_token_read_in_the_middle_has_the_state_that_the_whole_prompt_gives_it(model_type: str) -> None:
    model, prompts = tiny_model(model_type), Prompts(["Is it good? (A", "Was it bad? (B"], [1, 0])
    for index in (-1, -3, 4):
        tokens = tokenize(model, prompts, token_index=index)
        states = last_token_states(model, tokens)
        for row, text in enumerate(prompts.texts):
            ids = torch.tensor([model.tokenizer(text)["input_ids"]])
            with torch.no_grad():
                hidden = model.module(input_ids=ids, output_hidden_states=True).hidden_states
            expected = torch.stack([layer[0, index] for layer in hidden[:-1]])
            torch.testing.assert_close(states[row, :-1], expected, rtol=0, atol=1e-9)


def test_the_token_that_is_read_is_found_before_a_prompt_is_cut(gpt2: LanguageModel) -> None:
    model, text = marked(gpt2, "<s> $A", template=CHAT), "a long film. A"

    def spelled(**options: object) -> str:
        return model.tokenizer.decode(list(tokenize(model, Prompts([text], [1]), **options).ids[0]))  # type: ignore[arg-type]

    assert spelled(token_index=-3) == "<s>a long film."
    assert spelled(token_index=-3, max_tokens=6) == "<s>film."
    assert spelled(token_index=1, max_tokens=3) == "<s>a"
    assert spelled(token_index=-12, chat=True) == "<s><turn>user: a long film."
    assert spelled(token_index=-12, chat=True, max_tokens=13) == "<s><turn>user: film."
    tokens = tokenize(model, Prompts([text, "a film"], [1, 0]), token_index=-3)
    assert tokens.metadata["token_index"] == -3 and str(tokens) == "2 prompts; start token '<s>'; read at token -3"
    assert "token_index" not in tokenize(model, PROMPTS).metadata


def test_a_prompt_without_the_token_that_is_read_is_named_or_left_out(gpt2: LanguageModel) -> None:
    prompts = Prompts(["a long film", "a film", "a good film", "so-so"], [1, 0, 1, 0])
    for index in (-7, 6):
        with pytest.raises(InputError, match=rf"texts\[1\]='a film' has no token {index}\. Choose a token_index"):
            tokenize(gpt2, prompts.select([0, 1, 3]), token_index=index)
    tokens, left_out = usable_prompts(gpt2, prompts, token_index=-6)
    assert left_out == {"fewer than two tokens": (1,), "no token -6": (3,)}
    assert tokens == tokenize(gpt2, prompts.select([0, 2]), token_index=-6)
    with pytest.raises(InputError, match=r"other label .*read up to token_index=1 and cut.*read a later token"):
        tokenize(gpt2, prompts, token_index=1)
    with pytest.raises(InputError, match="token_index=128 must be at most 127"):
        tokenize(gpt2, prompts, token_index=128)


# Chats


@pytest.mark.parametrize("frame", ["$A", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("template", [CHAT, TURNS])
def test_a_chat_has_one_start_token_and_ends_before_the_answer(gpt2: LanguageModel, frame: str, template: str) -> None:
    model = marked(gpt2, frame, template=template)
    start = "<s>" * (frame != "$A" or template == CHAT)
    assert written(model, "a film", " It was", chat=True) == [
        f"{start}<turn>user: {text}<end><turn>model: " for text in ("a film", "It was")
    ]
    tokens = tokenize(model, Prompts(["a film"], [1]), chat=True)
    assert tokens.chat and tokens.start_token == start
    if template == CHAT:
        turn = [{"role": "user", "content": "a film"}]
        expected = model.tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"]
        assert list(tokens.ids[0]) == expected
    assert tokenize(model, PROMPTS).chat is False


def test_a_chat_cuts_the_text_and_never_the_template(gpt2: LanguageModel) -> None:
    model, text = marked(gpt2, "<s> $A", template=CHAT), "an old film, and a \N{SNOWMAN} too. It was"
    whole = tokenize(model, Prompts([text], [1]), chat=True)
    n_frame = len(whole.ids[0]) - len(text.encode())
    assert n_frame == 4 + len("user: model: ")  # each mark is one token
    for room in range(7, 12):  # bytes of the text's end
        tokens = tokenize(model, Prompts([text, "a film"], [1, 0], suffix=""), max_tokens=n_frame + room, chat=True)
        assert tokens.is_cut == (True, False) and len(tokens.ids[0]) <= n_frame + room
        cut = model.tokenizer.decode(list(tokens.ids[0]))
        assert cut == f"<s><turn>user: {text[-room:].strip()}<end><turn>model: "
    with pytest.raises(InputError, match=f"leaves no room .* takes {n_frame} tokens by itself"):
        tokenize(model, Prompts([text], [1]), max_tokens=n_frame, chat=True)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('A system turn must come first') }}", r"only turn \(A system turn must come first\)"),
        ("{{ messages[1]['content'] }}", "only turn .*no element 1"),
        ("{% if %}", "only turn"),
        ("{{ messages.clear() }}", "only turn .*access to attribute 'clear'"),
        ("{{ bos_token }}" + CHAT, "2 start tokens '<s>'"),
        (TURNS + "{{ bos_token }}", "2 start tokens '<s>'"),
        (" " + CHAT, "2 start tokens '<s>'"),
        ("{% for part in messages[0]['content'] %}{{ part['text'] }}{% endfor %}", "not hold the user's text"),
        ("{{ messages[0]['content'] | upper }}", "not hold the user's text"),
    ],
)
def test_a_template_that_cannot_serve_is_refused(gpt2: LanguageModel, template: str | None, message: str) -> None:
    model = marked(gpt2, "<s> $A", template=template)
    for function in (tokenize, usable_prompts):
        with pytest.raises(ModelError, match=message):
            function(model, PROMPTS, chat=True)
    assert len(tokenize(model, PROMPTS)) == 6


def test_a_start_mark_that_opens_every_turn_is_no_second_start_token(gpt2: LanguageModel) -> None:
    model = marked(gpt2, template=TURNS.replace("<turn>", "<s>"))  # as in models whose turns begin with it
    assert written(model, "a film", chat=True) == ["<s>user: a film<end><s>model: "]
    model = marked(gpt2, "</s> $A", template="{{ eos_token }}" + TURNS.replace("<end>", "</s>"), bos="</s>")
    assert written(model, "a film", chat=True) == ["</s><turn>user: a film</s><turn>model: "]


def test_a_text_with_a_start_token_of_its_own_is_no_turn_of_a_chat(gpt2: LanguageModel) -> None:
    model, prompts = marked(gpt2, "<s> $A", template=CHAT), Prompts(["a film", " <s>a good film"], [1, 0])
    with pytest.raises(InputError, match=r"texts\[1\]=' <s>a good film' has a start token of its own"):
        tokenize(model, prompts, chat=True)
    tokens, left_out = usable_prompts(model, prompts, chat=True)
    assert tokens == tokenize(model, prompts.select([0]), chat=True) and [*left_out.values()] == [(1,)]


def test_a_template_is_told_the_same_day_every_day(gpt2: LanguageModel) -> None:
    dated = "{{ 'Today is ' + strftime_now('%d %b %Y') + '. ' if strftime_now is defined }}" + TURNS
    (text,) = written(marked(gpt2, template=dated), "a film", chat=True)
    assert text.startswith("Today is 26 Jul 2024. <turn>user: a film")
    assert datetime.now().strftime("%Y") not in text


def test_what_was_done_to_prompts_is_in_the_metadata(gpt2: LanguageModel) -> None:
    model = marked(gpt2, "<s> $A", template=CHAT)
    texts = ["a film It was", "a long and dull film It was"]
    tokens = tokenize(model, Prompts(texts, [1, 0], suffix=" It was"), max_tokens=36, chat=True)
    done = {"start_token": "<s>", "chat": True, "suffix": " It was", "n_cut": 1}
    assert tokens.metadata == done and tokens.select([0]).metadata == {**done, "n_cut": 0}
    assert str(tokens) == (
        "2 prompts; start token '<s>'; in the chat template; suffix ' It was'; 1 cut on the left to 36 tokens"
    )
    directions = random_directions(5, 24)
    for result in (
        llvlit.measured_gains(model, tokens, directions, max_tokens=36),
        llvlit.adjoint_gains(model, tokens, directions, max_tokens=36),
        llvlit.identify(model, tokens, directions, max_tokens=36, order=2),
    ):
        assert result.metadata.items() >= done.items()
    plain = llvlit.adjoint_gains(gpt2, PROMPTS, directions).metadata
    assert (plain["start_token"], plain["chat"], plain["suffix"], plain["n_cut"]) == ("", False, "", 0)
    with pytest.raises(InputError, match=r"texts\[1\]='a' does not end in suffix=' It was'"):
        Prompts(["a film It was", "a"], [1, 0], suffix=" It was")


def test_a_chat_template_is_part_of_a_models_identity(gpt2: LanguageModel) -> None:
    identities = {marked(gpt2, template=template).identity for template in (None, CHAT, TURNS)}
    assert len(identities) == 3 and marked(gpt2, template=CHAT).identity in identities


def test_a_token_beyond_the_embedding_is_named_with_what_to_do() -> None:
    model = tiny_model(vocab_size=257)
    model.tokenizer.add_tokens(["zebra"])
    assert len(tokenize(model, PROMPTS)) == 6
    message = r"texts\[1\] holds token 257 \('zebra'\), and the embedding of tiny-gpt2 has 257.* resize the embedding"
    for function in (tokenize, usable_prompts):
        with pytest.raises(ModelError, match=message):
            function(model, Prompts(["a film", "a zebra"], [1, 0]))
    model.module.resize_token_embeddings(258)
    assert tokenize(model, Prompts(["a zebra"], [1])).ids[0][-1] == 257


# A prompt's numbers are its own


def alone(model: LanguageModel, tokens: TokenizedPrompts) -> torch.Tensor:
    return torch.cat([last_token_states(model, tokens.select([row])) for row in range(len(tokens))])


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_states_depend_neither_on_the_batch_nor_on_what_ran_before(model_type: str) -> None:
    model = marked(tiny_model(model_type), "<s> $A", template=CHAT)
    tokens = tokenize(model, PROMPTS, chat=True)
    expected = alone(model, tokens)
    scale = expected.abs().max()
    for order in ([0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3], [4, 4, 5]):
        states = last_token_states(model, tokens.select(order))
        assert (states - expected[order]).abs().max() < EXACT * scale
    again = marked(tiny_model(model_type), "<s> $A", template=CHAT)  # nothing has run yet
    assert torch.equal(last_token_states(again, tokenize(again, PROMPTS, chat=True).select([2])), expected[[2]])


@pytest.mark.parametrize("padded_by", ["<mask>", "</s>", None])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_a_tokenizer_says_of_padding_changes_no_number(
    gpt2: LanguageModel, padded_by: str | None, side: str
) -> None:
    plain, model = marked(gpt2, "<s> $A"), marked(gpt2, "<s> $A")
    if padded_by:
        model.tokenizer.pad_token = padded_by
        model.tokenizer.backend_tokenizer.enable_padding(direction=side, length=40)
        model.tokenizer.backend_tokenizer.enable_truncation(6)
    model.tokenizer.padding_side = model.tokenizer.truncation_side = side
    assert tokenize(model, PROMPTS).ids == tokenize(plain, PROMPTS).ids
    assert torch.equal(last_token_states(model, PROMPTS), last_token_states(plain, PROMPTS))
