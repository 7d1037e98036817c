"""The chat, driven by lines as a person types them."""

import io
import os
import re
import signal
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memlm import MemLMConfig, MemLMForCausalLM, attach_memory
from memlm.chat.conversation import Conversation, Sampling
from memlm.chat.main import load_conversation, main
from memlm.data.tokenizers import ByteTokenizer
from tests.models.attach_tools import base_model

LAYERS = [
    {
        "repeat": 2,
        "mixer": {"type": "sliding_attention", "window": 8, "num_heads": 2},
        "memory": {"type": "gated_delta", "num_heads": 2, "head_dim": 8},
        "ffn": "swiglu",
    }
]
END = ByteTokenizer().eos_token_id
# As the templates of chat models: every turn has a role and an end.
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STATUS = re.compile(
    r"\[state [\d.]+ (Ki)?B, (\d+) tokens seen, read [\d,.]+ tokens/s(, wrote [\d,.]+ tokens/s)?"
    r"(, stopped)?(, memory off)?\]"
)


class Keyboard(io.StringIO):
    """Standard input that is a terminal."""

    def isatty(self):
        return True


def make_model():
    torch.manual_seed(0)
    config = MemLMConfig(vocab_size=259, hidden_size=32, intermediate_size=48, layers=LAYERS)
    model = MemLMForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    # It says small letters only, so that the transcript can be read.
    letters = range(ord("a"), ord("z") + 1)
    model.generation_config.suppress_tokens = [
        token for token in range(259) if token not in letters
    ]
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    ByteTokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def talk(folder, monkeypatch, capsys):
    """Type lines into the chat: its answers, one for each line that is no command; and the rest."""

    def type_in(lines, *options, terminal=True):
        text = "".join(f"{line}\n" for line in lines) if terminal else lines
        monkeypatch.setattr(sys, "stdin", (Keyboard if terminal else io.StringIO)(text))
        words = ["--model", folder, "--temperature", "0", "--max_new_tokens", "6", *options]
        code = main(words)
        return code, capsys.readouterr()

    return type_in


def transcript(out):
    """What stands between the prompts: (answer, status) of turns, the text of commands."""
    parts = []
    for part in out.split("> ")[1:]:
        found = STATUS.search(part)
        parts.append((part[: found.start() - 1], found[0]) if found else part.strip("\n"))
    return parts


def test_save_wipe_and_load_bring_the_memory_back(talk, tmp_path):
    first, second, path = "the key is 7", "what is the key", tmp_path / "memory"
    code, out = talk([first, second])
    assert code == 0
    (_, status), (expected, _) = transcript(out.out)[:2]
    assert "18 tokens seen" in status  # 12 bytes read and 6 written

    lines = [first, f"/save {path}", "/wipe", second, f"/load {path}", second, "/quit", "never"]
    code, out = talk(lines)
    assert code == 0 and out.err == ""
    _, saved, wiped, alone, loaded, again, _ = transcript(out.out)
    assert saved.startswith(f"18 tokens kept in {path} (")
    assert wiped == "everything is forgotten"
    assert loaded == f"18 tokens remembered from {path}"
    assert again[0] == expected and alone[0] != expected
    assert "21 tokens seen" in alone[1] and "40 tokens seen" in again[1]

    code, out = talk([second], "--state", str(path))
    assert transcript(out.out)[0][0] == expected


def test_off_and_on(talk):
    text = "the key is 7 and nobody knows"
    code, out = talk([text, "/wipe", "/off", text, "/wipe", "/on", text])
    (on, _), _, off, (without, status), _, _, (again, _), _ = transcript(out.out)
    assert code == 0 and off == "the memories are off: neither read nor written"
    assert on == again != without and "memory off" in status


def test_the_memories_and_their_sizes(talk):
    _, out = talk(["/memory"])
    lines = transcript(out.out)[0].splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [
        ["0.memory", "gated_delta"],
        ["1.memory", "gated_delta"],
    ]
    assert all(re.search(r"[\d,]+ weights, state [\d.]+ (Ki)?B$", line) for line in lines[:2])
    assert lines[2].startswith("beside them")


def test_commands_that_cannot_be_go_on(talk, tmp_path):
    lines = ["/safe x", "/save x", "/save", "/load", f"/load {tmp_path / 'none'}"]
    lines += ["/temperature hot", "/temperature 0.5", "", "/help"]
    code, out = talk(lines)
    assert code == 0
    parts = transcript(out.out)
    assert parts[0] == "error: unknown command /safe; did you mean 'save'?; see /help"
    assert parts[1] == "error: nothing has been read yet, so there is nothing to save"
    assert parts[2] == "error: /save needs a file, as in /save memory.safetensors"
    assert "/load needs a file" in parts[3] and "no such file" in parts[4]
    assert parts[5] == "error: /temperature is 'hot'; it must be 0, or at least 0.001"
    assert parts[6] == parts[7] == "" and "/wipe" in parts[8]


def test_a_single_turn_without_a_terminal(talk):
    code, expected = talk(["the key"])
    code, out = talk([], "--prompt", "the key")
    assert code == 0 and STATUS.fullmatch(out.err.strip())
    assert out.out == transcript(expected.out)[0][0] + "\n"
    code, piped = talk("the key", terminal=False)
    assert code == 0 and piped.out == out.out


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_not_utf8_is_told(folder, terminal, monkeypatch, capsys):
    typed = io.TextIOWrapper(io.BytesIO(b"the \xff key\n"), encoding="utf-8")
    monkeypatch.setattr(typed, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["--model", folder]) == (0 if terminal else 2)
    out = capsys.readouterr()
    found, where = (out.out, "the line") if terminal else (out.err, "standard input")
    assert f"error: {where} is not utf-8 (invalid start byte)" in found


def test_samples_with_a_seed(talk):
    sampled = ["--temperature", "3", "--prompt", "the key"]
    same = [talk([], *sampled, "--seed", "5")[1].out for _ in range(2)]
    assert same[0] == same[1] != talk([], *sampled, "--seed", "6")[1].out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "--temperature is '-1'; it must be 0, or at least 0.001"),
        (["--temperature", "1e-300"], "it must be 0, or at least 0.001"),
        (["--seed", "-1"], "--seed is -1; it must be between 0 and 2^63 - 1"),
        (["--prompt", "half \udcff"], "the text is not Unicode (surrogates not allowed)"),
        (["--top_p", "2"], "--top_p is 2.0; it must be above 0 and at most 1"),
        (["--max_new_tokens", "0"], "--max_new_tokens is 0; it must be at least 1"),
        (["--dtype", "floot32"], "did you mean 'float32'?"),
        (["--device", "nowhere"], "--device 'nowhere' cannot be used"),
        (["--colour", "red"], "command line: unrecognized arguments: --colour red; see"),
        (["--state", "/nowhere/state"], "/nowhere/state: no such file"),
        (["--model", "/nowhere/model"], "no such model was found"),
        (["--prompt", ""], "the text has no token"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_mistakes_are_told_in_one_line(talk, options, message):
    code, out = talk([], *options)
    assert code == 2
    assert message in out.err and out.err.startswith("error: ") and out.err.count("\n") == 1


def test_models_without_a_memory_are_refused(tmp_path, capsys):
    base_model("llama").save_pretrained(tmp_path)
    assert main(["--model", str(tmp_path), "--prompt", "a"]) == 2
    assert "LlamaForCausalLM without a memory; attach one" in capsys.readouterr().err


def test_a_saved_memory_of_a_pretrained_model(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 40}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **layers, bos_token_id=None, eos_token_id=None))
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    memory = {"type": "gated_delta", "num_heads": 2, "head_dim": 8}
    model = attach_memory(base, {"memory": memory, "layers": [1], "output": "neural_cache"})
    model.save_pretrained(tmp_path / "memory")
    lines = ["hello there", f"/save {tmp_path / 'state'}", "/wipe", f"/load {tmp_path / 'state'}"]
    lines += ["/memory", "a line of 22 tokens...", "and a longer line, 27 tokens"]
    monkeypatch.setattr(sys, "stdin", Keyboard("\n".join(lines)))
    options = ["--tokenizer", "bytes", "--max_new_tokens", "5", "--seed", "1"]
    assert main(["--model", str(tmp_path / "memory"), *options]) == 0
    out = capsys.readouterr().out
    assert "16 tokens kept" in out and "16 tokens remembered" in out
    assert re.search(r"1\.memory +gated_delta .*\noutput +neural_cache ", out)
    assert out.count("tokens seen") == 1
    # In the middle of an answer, and of the line itself; nothing is read of either.
    assert re.findall(r"error: the context has (\d+) tokens, but .* allows 40", out) == ["41", "45"]


def test_ctrl_c_stops_the_answer_and_not_the_chat():
    conversation = Conversation(make_model(), ByteTokenizer(), Sampling(0, 1.0, 50))
    written = []

    def interrupt(text):
        written.append(text)
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGINT)

    # A space ends a word, which is shown then.
    conversation.tokenizer.decode = lambda ids, **kwargs: "x " * len(ids)
    turn = conversation.answer("the key", interrupt)
    assert turn.stopped and turn.written < 5 and written
    assert conversation.tokens == 7 + turn.written
    turn = conversation.answer("go on", lambda text: None)
    assert not turn.stopped and turn.written == 50


def test_ctrl_c_at_the_prompt_goes_on(folder, monkeypatch, capsys):
    lines = iter([KeyboardInterrupt, "/quit"])

    def read(prompt):
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr("builtins.input", read)
    assert main(["--model", folder]) == 0
    assert "/quit or the end of file (Ctrl-D) leaves" in capsys.readouterr().out


class Scripted(torch.nn.Linear):
    """A head that says given bytes, whatever it is given, and ends the answer then."""

    left = []

    def forward(self, hidden):
        logits = torch.full((*hidden.shape[:-1], self.out_features), -10.0)
        logits[..., self.left.pop(0) if self.left else END] = 10.0
        return logits


def scripted_model():
    model = make_model()
    model.generation_config.suppress_tokens = None
    model.lm_head = Scripted(32, 259, bias=False)
    return model


def test_characters_are_never_cut_in_half():
    model, written, said = scripted_model(), [], "grün 東京 ✓"
    model.lm_head.left = list(said.encode())
    conversation = Conversation(model, ByteTokenizer(), Sampling(0, 1.0, 40))
    turn = conversation.answer("?", written.append)
    assert "".join(written) == said and len(written) > 1
    assert turn.written == len(said.encode()) + 1


def test_a_chat_template_is_followed_turn_by_turn():
    """The states have read exactly what the template makes of the whole conversation."""
    tokenizer = ByteTokenizer(split_special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    model = scripted_model()
    conversation = Conversation(model, tokenizer, Sampling(0, 1.0, 40))
    for said, answer in (("hi", "hello"), ("and", "so")):
        model.lm_head.left = list(answer.encode())
        conversation.answer(said, lambda text: None)
    whole = "<user>hi<eos><assistant>hello<eos><user>and<eos><assistant>so"
    ids = tokenizer(whole, return_tensors="pt").input_ids
    expected = model(ids, return_memory_states=True).memory_states
    assert conversation.tokens == ids.shape[1] == len(whole) - 4 * 3
    memory, found = expected["1.memory"].tensors(), conversation.states["1.memory"].tensors()
    for field, tensor in memory.items():
        torch.testing.assert_close(found[field], tensor)


def test_dtype_and_device(folder):
    conversation = load_conversation(folder, None, "cpu", "bfloat16", Sampling(0, 1.0, 3))
    dtypes = {p.dtype for p in conversation.model.parameters()}
    assert conversation.model.dtype == torch.bfloat16 and torch.float32 in dtypes  # the rates
    assert conversation.answer("the key", lambda text: None).written == 3
