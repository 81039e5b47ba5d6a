"""lm-eval (the Language Model Evaluation Harness) with a KVCache: a model of the harness named `kvstrata`.

    python -m kvstrata.hf.lm_eval --model kvstrata --model_args pretrained=PATH,policy=streaming,budget=1024tok --tasks T

passes everything to the harness's own command line. Needs the extra: pip install "kvstrata[lm-eval]".
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from kvstrata.config import Unsupported
from kvstrata.hf.cache import KVCache
from kvstrata.hf.decoder import parameters_of, unwrap
from kvstrata.hf.patch import patch

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as missing:
    _HOW = f'no module named {missing.name}: install the harness with: pip install "kvstrata[lm-eval]"'
    if __name__ == "__main__":
        raise SystemExit(f"kvstrata.hf.lm_eval: {_HOW}") from None
    raise ModuleNotFoundError(_HOW, name=missing.name) from missing

logger = logging.getLogger("kvstrata")

Request = tuple[Any, list[int], list[int]]
"""What the harness makes of one log-likelihood request: (its strings or None, context ids, continuation ids)."""


class KVStrataLM(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model with a KVCache; any argument of HFLM, and those of the cache.

    policy, budget, far: as in KVCache.for_model. chunk: prompt tokens per forward (None: the prompt in one).
    stride: continuation tokens scored per forward. The model is patched, one passed as `pretrained` too.

    Generation is `generate` with a fresh cache per batch: what a user gets, so the first token of an answer is read
    off the prompt's own forward. Log-likelihoods are scored over a compressed cache: all of the context but its last
    token is prefilled and compressed, then that token and the continuation go in, `stride` at a time. In one forward
    over both, as HFLM does it, nothing would ever be read from a cache. A rolling log-likelihood is all continuation:
    each piece of `stride` tokens reads the cache that the pieces before it left, so the number belongs to its stride.
    Contexts are prefilled once for all their continuations. One sequence at a time, whatever the batch size.

    Results are query-aware: a policy that scores has seen the question. A byte budget is of a whole batch of answers
    generated together: with a batch size of 1 it is of one sequence, as it is in log-likelihoods.

    ValueError or Unsupported at construction, for a model, a policy, a budget or a precision that cannot work.
    """

    def __init__(
        self,
        pretrained: Any,
        *args: Any,
        policy: Any = None,
        budget: Any = None,
        far: Any = "auto",
        chunk: int | None = None,
        stride: int = 64,
        **kwargs: Any,
    ) -> None:
        for name, value in (("chunk", chunk), ("stride", stride)):
            optional = name == "chunk" and value is None
            if not optional and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}: expected tokens per forward, an int >= 1, got {value!r}")
        if kwargs.get("mixed_precision_dtype") is not None:
            raise Unsupported(
                "mixed_precision_dtype: under autocast keys and values differ in dtype, a cache has one; give dtype= instead"
            )
        super().__init__(pretrained, *args, **kwargs)
        self.policy, self.budget, self.far = policy, budget, far
        self.chunk, self.stride = chunk, stride
        self._most = 0
        patch(self.model)
        self._new_cache()  # what cannot work is refused before the tasks are built

    # -- generation -------------------------------------------------------------------------------------------------

    def _model_generate(self, context: Any, max_length: int, stop: Any, **generation_kwargs: Any) -> Any:
        cache = self._new_cache()
        if self.chunk is not None:
            generation_kwargs["prefill_chunk_size"] = self.chunk
        out = super()._model_generate(context, max_length, stop, past_key_values=cache, **generation_kwargs)
        self._weigh(cache)
        return out

    # -- log-likelihoods --------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-probability of the continuation, whether greedy decoding gives it) of each request."""
        contexts: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            known, fed = self._split(context, continuation)
            contexts.setdefault(known, {}).setdefault(fed, []).append(i)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        ) as bar:
            for known in sorted(contexts, key=len, reverse=True):  # the longest first: what does not fit fails at once
                branches = contexts[known]
                for cache, (fed, members) in zip(self._caches(known, len(branches)), branches.items(), strict=True):
                    scored = self._score(cache, fed, [requests[i][2] for i in members])
                    cache.reset()
                    answers.update(zip(members, scored, strict=True))
                    bar.update(len(members))
        ordered = [answers[i] for i in range(len(requests))]
        for (strings, _, _), answer in zip(requests, ordered, strict=True):
            if strings is not None:  # None: a window of a rolling request, which the caller sums up
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return ordered

    def _split(self, context: list[int], continuation: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(tokens to prefill, tokens whose logits score the continuation), cut on the left as HFLM cuts."""
        n, most = len(continuation), self.max_length
        if not context or not 0 < n <= most:
            raise ValueError(
                f"loglikelihood: expected a context and a continuation of 1 to {most} tokens, the model's maximum, "
                f"got {len(context)} and {n}"
            )
        if len(context) + n > most + 1:
            logger.warning(
                "context of %d and continuation of %d tokens exceed the model's %d: cut on the left",
                len(context),
                n,
                most,
            )
        tokens = tuple((context + continuation)[-(most + 1) : -1])
        return tokens[:-n], tokens[-n:]

    def _caches(self, known: tuple[int, ...], n: int) -> Iterator[KVCache]:
        """n caches, one after another, that continue from the prefilled tokens `known`."""
        base = self._prefilled(known)
        budget = base.cache.budget
        # A byte budget is of all sequences of a cache together: a fork beside its origin is refused, or gets less.
        alone = budget is not None and budget.unit != "tokens"
        if alone:
            yield base
        for _ in range(n - 1):
            yield self._prefilled(known) if alone else base.fork()
        if not alone:
            yield base

    def _prefilled(self, tokens: tuple[int, ...]) -> KVCache:
        cache = self._new_cache()
        size = self.chunk or len(tokens) or 1
        # The logits of a long prompt would take more memory than its cache.
        last = {"logits_to_keep": 1} if "logits_to_keep" in parameters_of(unwrap(self.model))[0] else {}
        for start in range(0, len(tokens), size):
            self._forward(cache, tokens[start : start + size], **last)
        if tokens:
            cache.end_prefill()
        self._weigh(cache)
        return cache

    def _score(self, cache: KVCache, fed: tuple[int, ...], continuations: list[list[int]]) -> list[tuple[float, bool]]:
        """Answers for n continuations of T tokens that share `fed`, the T tokens before each of theirs."""
        wanted = torch.tensor(continuations, device=self.device)  # [n, T]
        total = torch.zeros(len(continuations), dtype=torch.float64)
        greedy = torch.ones(len(continuations), dtype=torch.bool)
        for start in range(0, len(fed), self.stride):
            piece = slice(start, start + self.stride)
            logits = self._forward(cache, fed[piece])  # [t, V]
            logs = torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)
            targets = wanted[:, piece].to(logs.device)  # [n, t]
            total += logs.gather(1, targets.T).sum(0, dtype=torch.float32).cpu()
            greedy &= (logs.argmax(-1) == targets).all(1).cpu()
        self._weigh(cache)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def _forward(self, cache: KVCache, tokens: tuple[int, ...], **kwargs: Any) -> torch.Tensor:
        """Logits [T, V] of T tokens that go into the cache."""
        ids = torch.tensor([tokens], device=self.device)
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=ids, past_key_values=cache, use_cache=True, **kwargs).logits[0]
        return logits

    # -- the cache ----------------------------------------------------------------------------------------------------

    def _new_cache(self) -> KVCache:
        return KVCache.for_model(self.model, policy=self.policy, budget=self.budget, far=self.far)

    def _weigh(self, cache: KVCache) -> None:
        self._most = max(self._most, cache.nbytes())

    def get_model_info(self) -> dict[str, Any]:
        """As HFLM, and what the cache was: it goes into the results file. Bytes: the most that one cache held at rest."""
        from kvstrata import __version__

        core = self._new_cache().cache
        budget = None if core.budget is None else str(core.budget)
        ours: dict[str, Any] = {"version": __version__, "policy": core.policy.name, "budget": budget}
        ours |= {"chunk": self.chunk, "stride": self.stride, "mode": "query-aware", "cache_bytes": self._most}
        return {**super().get_model_info(), **{f"kvstrata_{name}": value for name, value in ours.items()}}


def main() -> None:
    """The harness's own command line, on sys.argv, with `kvstrata` among its models."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":  # this copy of the file is not the module that others import: only that one registers
    from kvstrata.hf.lm_eval import main as run

    run()
else:
    register_model("kvstrata")(KVStrataLM)
