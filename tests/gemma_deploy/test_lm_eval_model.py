import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from gemma_deploy.errors import RequestError
from tests.rounding import MODEL_FLOAT32, UNIT_ROUNDOFF

# Nats of a text are logits and differences of them: as far off as these are.
REL = MODEL_FLOAT32 * UNIT_ROUNDOFF["float32"]
LONG = "You may reproduce and distribute copies of the Work in any medium. " * 4


class Hook:
    """Records what lm-eval would cache."""

    def __init__(self) -> None:
        self.added: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, arguments: Any, result: Any) -> None:
        self.added.append((kind, arguments, result))


class FakeLM:
    """What lm-eval's base class gives a model."""

    def __init__(self) -> None:
        self.cache_hook = Hook()


@pytest.fixture(scope="module")
def registered() -> Iterator[dict[str, Any]]:
    """The models that importing the module registers with a stand-in for lm-eval."""
    models: dict[str, Any] = {}

    def register_model(name: str) -> Callable[[Any], Any]:
        return lambda model: models.setdefault(name, model)

    package, api = ModuleType("lm_eval"), ModuleType("lm_eval.api")
    model, registry = ModuleType("lm_eval.api.model"), ModuleType("lm_eval.api.registry")
    vars(model)["LM"] = FakeLM
    vars(registry)["register_model"] = register_model
    with pytest.MonkeyPatch.context() as patch:
        for module in (package, api, model, registry):
            patch.setitem(sys.modules, module.__name__, module)
        patch.delitem(sys.modules, "gemma_deploy.lm_eval_model", raising=False)
        importlib.import_module("gemma_deploy.lm_eval_model")
        yield models
    sys.modules.pop("gemma_deploy.lm_eval_model", None)


@pytest.fixture(scope="module")
def lm(registered: dict[str, Any], bundle: Path) -> Iterator[Any]:
    model = registered["gemma-deploy"](
        str(bundle), device="cpu", max_length=64, batch_size=1, max_batch_size=None
    )
    yield model
    model.close()


@pytest.fixture(scope="module")
def log_p(lm: Any, bundle_checkpoint: Path, oracle: Any) -> Callable[[list[int]], torch.Tensor]:
    """Return what transformers says after each of these tokens, [S, V]."""

    def get(token_ids: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits = oracle(bundle_checkpoint)(torch.tensor([token_ids])).logits[0]
        return torch.log_softmax(logits.double(), dim=-1)

    assert lm.max_length == 64
    return get


def asked(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=arguments)]


def encode(lm: Any, text: str) -> list[int]:
    token_ids: list[int] = lm._tokenizer.encode(text, add_bos=True)
    return token_ids


class TestLoglikelihood:
    @pytest.mark.parametrize(
        ("context", "continuation"),
        [("You may", " not use this file"), ("You may ", "not use"), ("", "Licensed under")],
    )
    def test_is_the_sum_over_the_continuations_tokens(
        self, context: str, continuation: str, lm: Any, log_p: Any
    ) -> None:
        ((found, is_greedy),) = lm.loglikelihood(asked(context, continuation))

        whole = encode(lm, context + continuation)
        first = len(encode(lm, context.rstrip()))
        rows = log_p(whole[:-1])
        expected = sum(rows[i - 1, whole[i]].item() for i in range(first, len(whole)))
        assert found == pytest.approx(expected, rel=REL)
        assert is_greedy is False

    def test_tells_a_greedy_continuation(self, lm: Any, log_p: Any) -> None:
        prompt = encode(lm, "You may reproduce")
        best = lm._tokenizer.decode([int(log_p(prompt)[-1].argmax())])

        ((_, is_greedy),) = lm.loglikelihood(asked("You may reproduce", best))

        is_one_token = encode(lm, "You may reproduce" + best)[: len(prompt)] == prompt
        assert is_greedy is is_one_token is True

    def test_a_long_context_is_cut_on_the_left_behind_bos(self, lm: Any, log_p: Any) -> None:
        ((found, _),) = lm.loglikelihood(asked(LONG, " You may"))

        bos, *whole = encode(lm, LONG.rstrip() + "  You may")
        count = len(whole) + 1 - len(encode(lm, LONG.rstrip()))
        read = [bos, *whole[-64:]]
        rows = log_p(read[:-1])
        expected = sum(rows[i - 1, read[i]].item() for i in range(len(read) - count, len(read)))
        assert len(whole) > 64
        assert found == pytest.approx(expected, rel=REL)

    def test_nothing_is_certain(self, lm: Any) -> None:
        assert lm.loglikelihood(asked("You may", "")) == [(0.0, True)]

    def test_a_continuation_longer_than_the_model_sees_is_refused(self, lm: Any) -> None:
        with pytest.raises(RequestError, match="the model sees 64: choose a larger max_length"):
            lm.loglikelihood(asked("You may", LONG))


def test_rolling_likelihood_is_that_of_windows_side_by_side(lm: Any, log_p: Any) -> None:
    (found,) = lm.loglikelihood_rolling(asked(LONG))

    bos, *whole = encode(lm, LONG)
    expected = 0.0
    for start in range(0, len(whole), 64):
        part = whole[start : start + 64]
        rows = log_p([bos, *part[:-1]])
        expected += sum(rows[i, token].item() for i, token in enumerate(part))
    assert found == pytest.approx(expected, rel=REL)


class TestGenerateUntil:
    def test_is_greedy_up_to_the_first_stop(self, lm: Any, log_p: Any) -> None:
        (whole,) = lm.generate_until(asked("You may", {"until": [], "max_gen_toks": 12}))
        stops = [whole[9:11], whole[5:7]]
        keywords = {"until": stops, "max_gen_toks": 12, "do_sample": False, "temperature": 0.0}

        (found,) = lm.generate_until(asked("You may", keywords))

        token_ids = encode(lm, "You may")
        for _ in range(12):
            token_ids.append(int(log_p(token_ids)[-1].argmax()))
        assert whole == lm._tokenizer.decode(token_ids)[len("You may") :]
        assert found == whole[: min(whole.index(stop) for stop in stops)]

    def test_samples_where_it_is_asked_to(self, lm: Any) -> None:
        keywords = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 50}

        answers = {lm.generate_until(asked("You may", keywords))[0] for _ in range(4)}

        assert len(answers) > 1

    def test_a_long_context_leaves_room(self, lm: Any) -> None:
        (found,) = lm.generate_until(asked(LONG, {"until": "\n\n\n", "max_gen_toks": 8}))

        assert found

    def test_no_room_is_an_error(self, lm: Any) -> None:
        with pytest.raises(RequestError, match="max_gen_toks is 64; it must be below max_length"):
            lm.generate_until(asked("You may", {"max_gen_toks": 64}))


def test_answers_are_given_to_the_cache(lm: Any) -> None:
    lm.cache_hook.added.clear()

    (found,) = lm.loglikelihood(asked("You may", " not"))

    assert lm.cache_hook.added == [("loglikelihood", ("You may", " not"), found)]


def test_chats_are_written_by_the_models_template(lm: Any) -> None:
    found = lm.apply_chat_template([{"role": "user", "content": "Hi"}])

    assert found == "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert lm.tokenizer_name == "tiny"
