"""`generate`: transformers' own entry, with a loop that also reads coordinates and sizes.

transformers prepares a generation (config, logits processors, stopping criteria, cache, streamer) and
then calls `_sample`. The loop here is the engine's state machine (`decoding.advance`) over the model's
forward pass, so rows of all skills may stand in one batch, and ids and values are those of the commands.

`max_new_tokens` bounds text: with reasoning, the reasoning and the answer each. `max_objects` (150)
bounds detect and point. Beams are for captions and plain answers; they run in transformers' own loop.

Shape suffixes: B rows, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from md3cli.errors import RequestError
from md3cli.model.decoding import Mode, Rows, advance
from md3cli.model.hf.config import Moondream3Config
from md3cli.model.hf.generation_rows import Decisions, Moondream3Generation, new_rows, plain_results, read_prompts
from md3cli.model.hf.inputs import has_images, read_positions, read_task
from md3cli.model.moondream import Moondream3

MAX_NEW_TOKENS, MAX_OBJECTS = 768, 150
_OWN_ARGUMENTS = ("max_objects",)  # of generate, beyond transformers' own


def default_generation_config(config: Moondream3Config) -> GenerationConfig:
    """Greedy, 768 new tokens, the end of text stops."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


class SequenceRun:
    """The inputs of a batch so far and the forward pass over them, with a cache or without."""

    def __init__(self, owner: GenerationMethods, ids_BT: Tensor, given: dict[str, Any]) -> None:
        self.owner = owner
        self.cache: Cache | None = given.get("past_key_values") if given.get("use_cache", True) else None
        mask, tilings = given.get("attention_mask"), given.get("tilings")
        self.valid = torch.ones_like(ids_BT).bool() if mask is None else mask.to(ids_BT.device).bool()
        self.has_image = has_images(tilings, len(ids_BT), ids_BT.device)
        self.positions = read_positions(self.valid, ids_BT.shape[1])
        past = self.cache.get_seq_length() if self.cache is not None else 0
        self.x = owner.embed_inputs(
            ids_BT[:, past:],
            None if past else given.get("pixel_values"),
            tilings,
            self.valid[:, past:],
            given.get("region_values"),
        )

    def prefill(self) -> Tensor:
        """Hidden state behind each row's last input [B, D]; padding may stand on either side."""
        hidden_BTD = self._run(self.x)
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        last_B = (columns * self.valid).argmax(dim=1) - (self.valid.shape[1] - hidden_BTD.shape[1])
        return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), last_B]

    def step(self, x_BD: Tensor, position_B: Tensor, is_active_B: Tensor) -> Tensor:
        """Feed every row one more input; hidden states [B, D]. Rows that are done are stepped along, unseen."""
        self.valid = torch.cat([self.valid, is_active_B[:, None]], dim=1)
        self.positions = torch.cat([self.positions, position_B[:, None]], dim=1)
        if self.cache is None:
            self.x = torch.cat([self.x, x_BD[:, None]], dim=1)
            return self._run(self.x)[:, -1]
        return self._run(x_BD[:, None])[:, -1]

    def _run(self, x_BTD: Tensor) -> Tensor:
        positions = self.positions[:, -x_BTD.shape[1] :]
        return self.owner.hidden_states(x_BTD, self.valid, positions, self.has_image, self.cache)


class GenerationMethods(GenerationMixin):
    """`generate` for the model class."""

    model: Moondream3
    config: Moondream3Config
    embed_inputs: Callable[..., Tensor]
    hidden_states: Callable[..., Tensor]

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        own_left_out = {key: value for key, value in model_kwargs.items() if key not in _OWN_ARGUMENTS}
        super()._validate_model_kwargs(own_left_out)  # type: ignore[misc]

    @torch.no_grad()
    def _sample(  # type: ignore[override]
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | list[Tensor] | Moondream3Generation:
        """Greedy search and sampling, called by transformers' `generate`."""
        config = self.config.network
        run = SequenceRun(self, input_ids.to(self.model.device), model_kwargs)
        prompts = read_prompts(input_ids, run.valid, run.has_image, config.prefix_len)
        lengths = run.valid.sum(dim=1)
        if int(lengths.max()) > config.text.max_context:
            raise RequestError(
                f"the inputs take {int(lengths.max())} positions and the context holds {config.text.max_context}"
            )
        limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
        limit = min(limits, default=input_ids.shape[1] + MAX_NEW_TOKENS) - input_ids.shape[1]
        rows = new_rows(prompts, lengths, limit, model_kwargs.get("max_objects") or MAX_OBJECTS, config)
        pad_id = int(generation_config.pad_token_id or 0)
        decisions = Decisions(config, pad_id, len(input_ids), self.model.dtype)
        draw = Draw(logits_processor, generation_config)
        hidden_BD, ids_BT, is_over = run.prefill(), input_ids.to(self.model.device), False
        while self._has_unfinished_sequences(is_over, synced_gpus, device=ids_BT.device):
            draw.ids_BT, modes_B = ids_BT, rows.mode
            step = advance(self.model, rows, hidden_BD, config.text.max_context, draw=draw)
            tokens_B = torch.tensor(decisions.take(step.events), device=ids_BT.device)
            ids_BT = torch.cat([ids_BT, tokens_B[:, None]], dim=1)
            if streamer is not None:
                streamer.put(tokens_B.cpu())  # type: ignore[no-untyped-call]
            stopped_B = (step.rows.mode != Mode.IDLE) & self._stops(stopping_criteria, ids_BT, draw.scores, modes_B)
            for row in stopped_B.nonzero()[:, 0].tolist():
                decisions.finish_reasons[row] = "stop"
            rows = step.rows._replace(mode=step.rows.mode.masked_fill(stopped_B, int(Mode.IDLE)))
            is_active_B = rows.mode != Mode.IDLE
            is_over = not bool(is_active_B.any())
            if not is_over or synced_gpus:
                hidden_BD = run.step(step.next_ND, rows.position, is_active_B)
                rows = rows._replace(position=rows.position + is_active_B)
        if streamer is not None:
            streamer.end()  # type: ignore[no-untyped-call]
        return self._results(prompts, ids_BT, decisions, draw, generation_config, run)

    def _stops(self, criteria: StoppingCriteriaList, ids_BT: Tensor, scores: list[Tensor], modes_B: Tensor) -> Tensor:
        """Rows that the caller's criteria end; lengths are counted in `Rows`, and only text ends by its ids."""
        stops_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                continue
            met_B = criterion(ids_BT, tuple(scores)).to(stops_B.device)
            stops_B |= met_B & (modes_B == Mode.TEXT) if isinstance(criterion, EosTokenCriteria) else met_B
        return stops_B

    def _results(
        self,
        prompts: list[list[int]],
        ids_BT: Tensor,
        decisions: Decisions,
        draw: Draw,
        generation_config: GenerationConfig,
        run: SequenceRun,
    ) -> Tensor | list[Tensor] | Moondream3Generation:
        tasks = [read_task(prompt, self.config.network) for prompt in prompts]
        objects = [decisions.objects(row, task) for row, task in enumerate(tasks)]
        if not generation_config.return_dict_in_generate:
            return plain_results(tasks, ids_BT, objects, decisions.lengths)
        return Moondream3Generation(
            sequences=ids_BT,
            region_values=decisions.values().to(ids_BT.device),
            objects=objects,
            finish_reasons=decisions.finish_reasons,
            scores=tuple(draw.scores) if generation_config.output_scores else None,
            logits=tuple(draw.logits) if generation_config.output_logits else None,
            past_key_values=run.cache,
        )


class Draw:
    """`decoding.Draw` by transformers' logits processors; rows that do not write text stay greedy."""

    def __init__(self, processors: LogitsProcessorList, config: GenerationConfig) -> None:
        self.processors, self.config = processors, config
        self.ids_BT = torch.empty(0)
        self.scores: list[Tensor] = []
        self.logits: list[Tensor] = []

    def __call__(self, logits_BV: Tensor, rows: Rows) -> Tensor:
        greedy_B = logits_BV.argmax(dim=-1)
        if self.config.output_logits:
            self.logits.append(logits_BV.clone())
        scores_BV: Tensor = self.processors(self.ids_BT, logits_BV)  # type: ignore[arg-type]
        if self.config.output_scores:
            self.scores.append(scores_BV)
        if self.config.do_sample:
            probabilities_BV = scores_BV.softmax(dim=-1).nan_to_num(
                1.0
            )  # `Decisions.take` refuses rows of NaN, in words
            token_B = torch.multinomial(probabilities_BV, num_samples=1)[:, 0]
        else:
            token_B = scores_BV.argmax(dim=-1)
        writes_B = (rows.mode == Mode.TEXT) | (rows.mode == Mode.REASON)
        return torch.where(writes_B, token_B, greedy_B)
