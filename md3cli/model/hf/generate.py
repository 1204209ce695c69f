"""`generate`: transformers' own entry, with a loop that also reads coordinates and sizes.

transformers prepares a generation (config, logits processors, stopping criteria, cache, streamer) and then calls
`_sample`. Its loop here leads the engine's state machine (`state.advance`) with the model's forward pass, so that rows
of all skills may stand in one batch, and ids and values are those of the commands. The host collects the decisions, one
of each row a step.

`max_new_tokens` bounds text: with reasoning, the reasoning and the answer each. `max_objects` (150) bounds detect and
point. Beams are for captions and plain answers; they run in transformers' own loop. The model class alone mixes this
in, and would have 770 lines with it.

Shape suffixes: B rows, T positions, S steps, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, GenerationMixin
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer
from transformers.utils.generic import ModelOutput

from md3cli.errors import RequestError
from md3cli.model.engine.generation import FINISH_REASONS, first_mode
from md3cli.model.engine.state import Event, Finish, Mode, Rows, advance, idle_rows
from md3cli.model.hf.config import Moondream3Config
from md3cli.model.hf.inputs import NO_VALUE, Batch, Row, Value, has_images, read_positions, read_task
from md3cli.model.network.config import ModelConfig
from md3cli.model.network.moondream import Moondream3, coord_value, not_finite, size_value
from md3cli.records import Task

MAX_NEW_TOKENS, MAX_OBJECTS = 768, 150
_OWN_ARGUMENTS = ("max_objects",)  # of generate, beyond transformers' own


@dataclass
class Moondream3Generation(ModelOutput):
    """What `generate` returns with `return_dict_in_generate`.

    `sequences` [B, T]: the inputs' ids and the decided ones, padded behind; a coordinate or size shows
    as its id. `region_values` [B, S, 2]: the values behind the decided ids, NaN elsewhere. `objects`: boxes [n, 4]
    of each row of detect, points [n, 2] of each row of point, None for other rows. `finish_reasons`: `stop` or
    `length` for each row.
    """

    sequences: Tensor | None = None
    region_values: Tensor | None = None
    objects: list[Tensor | None] | None = None
    finish_reasons: list[str] | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    past_key_values: object | None = None


class DecidedRows:
    """The rows of a batch as they grow: what each row decided, and how it ended. Knows no network."""

    def __init__(self, config: ModelConfig, pad_id: int, num_rows: int, dtype: torch.dtype) -> None:
        self.config, self.pad_id, self.dtype = config, pad_id, dtype
        self.rows = [Row() for _ in range(num_rows)]
        self.finish_reasons = ["length"] * num_rows
        self._num_steps = 0

    def take(self, events: Tensor) -> list[int]:
        """Note one step's events [B, len(Event)]; return the id that each row decided on, padding for idle ones.

        Raises:
            RequestError: of type `model`, where a row decided by values that are not finite.
        """
        parsed = [Event(*values) for values in events.tolist()]
        bad = [row for row, event in enumerate(parsed) if event.mode != Mode.IDLE and not event.is_finite]
        if bad:
            raise RequestError(f"row {bad[0]} of the batch: {not_finite(self.dtype)}", "model")
        self._num_steps += 1
        decided = [self.pad_id] * len(parsed)
        for number, event in enumerate(parsed):
            if event.mode == Mode.IDLE:
                continue
            decided[number], value = self._read(event)
            self.rows[number].add(decided[number], value)
            if event.finish != Finish.NO:
                self.finish_reasons[number] = FINISH_REASONS[Finish(int(event.finish))]
        return decided

    def _read(self, event: Event) -> tuple[int, Value]:
        """Return the id of a decision, and the value behind it."""
        tokens, region, mode, token = self.config.tokenizer, self.config.region, int(event.mode), int(event.token)
        if mode == Mode.Y or (mode == Mode.X and token != tokens.eos_id):
            token = tokens.coord_id
        if mode == Mode.SIZE:
            token = tokens.size_id
        if token == tokens.coord_id and mode != Mode.TEXT:
            value = coord_value(torch.tensor(event.coord_bin), region.coord_out_dim).item()
            return token, (value, value)
        if token == tokens.size_id and mode in (Mode.SIZE, Mode.SEGMENT):
            bins = torch.tensor([event.width_bin, event.height_bin])
            width, height = size_value(bins, region.size_out_dim // 2).tolist()
            return token, (width, height)
        return token, NO_VALUE

    def values(self) -> Tensor:
        """Return the values behind the decided ids, [B, S, 2], NaN where an id has none."""
        padded = [[*row.values, *[NO_VALUE] * (self._num_steps - len(row.values))] for row in self.rows]
        return torch.tensor(padded, dtype=torch.float32)

    def objects(self, row: int, task: Task | None) -> Tensor | None:
        """Return boxes (x_min, y_min, x_max, y_max) or points of a row that looked for objects; None for text."""
        if task not in (Task.DETECT, Task.POINT):
            return None
        values = torch.tensor(self.rows[row].values, dtype=torch.float32)
        values = values[~values[:, 0].isnan()]
        if task is Task.POINT:
            return values[: len(values) // 2 * 2, 0].reshape(-1, 2)
        parts = values[: len(values) // 3 * 3].reshape(-1, 3, 2)  # an object the context cut short is left out
        centre, half = parts[:, :2, 0], parts[:, 2] / 2
        return torch.cat([centre - half, centre + half], dim=1)

    def plain_results(
        self, tasks: Sequence[Task | None], sequences: Tensor, objects: list[Tensor | None]
    ) -> Tensor | list[Tensor]:
        """Return ids [B, T], boxes [B, most, 4] or points [B, most, 2]; a list where rows differ in kind.

        Rows with fewer objects are padded with zeros. In a list each row has its own length, and ids are those of
        its inputs and decisions.
        """
        found = [entry for entry in objects if entry is not None]
        if not found:
            return sequences
        if len(found) == len(objects) and len(set(tasks)) == 1:
            return torch.nn.utils.rnn.pad_sequence(found, batch_first=True).to(sequences.device)
        lengths = [len(row.ids) for row in self.rows]
        width = sequences.shape[1] - max(lengths)
        rows = zip(sequences, objects, lengths, strict=True)
        return [ids[: width + length] if entry is None else entry.to(ids.device) for ids, entry, length in rows]


def default_generation_config(config: Moondream3Config) -> GenerationConfig:
    """Return a config of greedy search: 768 new tokens at most, and the end of text stops."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )


class BatchRun:
    """The inputs of a batch so far, with the task of each row, and the forward pass over them; a cache is optional."""

    def __init__(self, owner: GenerationMethods, ids_BT: Tensor, given: dict[str, Any]) -> None:
        cache: Cache | None = given.get("past_key_values") if given.get("use_cache", True) else None
        mask, tilings = given.get("attention_mask"), given.get("tilings")
        self.owner = owner
        self.valid = torch.ones_like(ids_BT).bool() if mask is None else mask.to(ids_BT.device).bool()
        has_image = has_images(tilings, len(ids_BT), ids_BT.device)
        starts = [owner.config.network.prefix_len if has else 1 for has in has_image.tolist()]
        rows = zip(ids_BT, self.valid, starts, strict=True)
        self.prompts = [ids[valid].tolist()[start:] for ids, valid, start in rows]  # no padding, image or BOS
        self.tasks = [read_task(prompt, owner.config.network) for prompt in self.prompts]
        self.positions = read_positions(self.valid, ids_BT.shape[1])
        past = cache.get_seq_length() if cache is not None else 0
        self.batch = Batch(
            ids_BT[:, past:],
            given.get("pixel_values"),
            tilings,
            past_key_values=cache,
            region_values=given.get("region_values"),
        )
        self.x = owner.embed_inputs(self.batch, self.valid[:, past:])

    def new_rows(self, limit: int, max_objects: int) -> Rows:
        """Return the state of the rows as it is when their inputs have just been run.

        Raises:
            RequestError: the inputs do not fit the context.
        """
        config, lengths = self.owner.config.network, self.valid.sum(dim=1)
        if int(lengths.max()) > config.text.max_context:
            raise RequestError(
                f"the inputs take {int(lengths.max())} positions and the context holds {config.text.max_context}"
            )
        rows = idle_rows(len(lengths), lengths.device)
        for row, (prompt, task) in enumerate(zip(self.prompts, self.tasks, strict=True)):
            reasons = prompt[-1:] == [config.tokenizer.thinking_id]
            rows.mode[row] = int(first_mode(task, reasons))
            rows.limit[row] = max_objects if task in (Task.DETECT, Task.POINT) else limit
            rows.is_point[row] = task is Task.POINT
        rows.is_first.fill_(True)
        rows.position.copy_(lengths)
        return rows

    def prefill(self) -> Tensor:
        """Return the hidden state behind each row's last input [B, D]; padding may stand on either side."""
        hidden_BTD = self._run(self.x)
        columns = torch.arange(self.valid.shape[1], device=self.valid.device)
        last_B = (columns * self.valid).argmax(dim=1) - (self.valid.shape[1] - hidden_BTD.shape[1])
        return hidden_BTD[torch.arange(len(hidden_BTD), device=hidden_BTD.device), last_B]

    def step(self, x_BD: Tensor, position_B: Tensor, is_active_B: Tensor) -> Tensor:
        """Feed every row one more input, those that are done too; return hidden states [B, D]."""
        self.valid = torch.cat([self.valid, is_active_B[:, None]], dim=1)
        self.positions = torch.cat([self.positions, position_B[:, None]], dim=1)
        if self.batch.past_key_values is None:
            self.x = torch.cat([self.x, x_BD[:, None]], dim=1)
            return self._run(self.x)[:, -1]
        return self._run(x_BD[:, None])[:, -1]

    def _run(self, x_BTD: Tensor) -> Tensor:
        return self.owner.batch_states(
            replace(self.batch, inputs_embeds=x_BTD, attention_mask=self.valid, position_ids=self.positions)
        )


class GenerationMethods(GenerationMixin):
    """`generate` for the model class."""

    model: Moondream3
    config: Moondream3Config
    embed_inputs: Callable[[Batch, Tensor], Tensor]
    batch_states: Callable[[Batch], Tensor]
    from_first: Callable[[Tensor], Tensor]

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
        """Search greedily or sample, as transformers' `generate` asks."""
        config = self.config.network
        run = BatchRun(self, input_ids.to(self.model.device), model_kwargs)
        limits = [criterion.max_length for criterion in stopping_criteria if isinstance(criterion, MaxLengthCriteria)]
        limit = min(limits, default=input_ids.shape[1] + MAX_NEW_TOKENS) - input_ids.shape[1]
        rows = run.new_rows(limit, model_kwargs.get("max_objects") or MAX_OBJECTS)
        decided = DecidedRows(config, int(generation_config.pad_token_id or 0), len(input_ids), self.model.dtype)
        draw = Draw(logits_processor, generation_config, self.from_first)
        hidden_BD, ids_BT, is_over = run.prefill(), input_ids.to(self.model.device), False
        while self._has_unfinished_sequences(is_over, synced_gpus, device=ids_BT.device):
            draw.ids_BT, modes_B = ids_BT, rows.mode
            step = advance(self.model, rows, hidden_BD, config.text.max_context, draw=draw)
            tokens_B = torch.tensor(decided.take(step.events), device=ids_BT.device)
            ids_BT = torch.cat([ids_BT, tokens_B[:, None]], dim=1)
            if streamer is not None:
                streamer.put(tokens_B.cpu())  # type: ignore[no-untyped-call]
            stops_B = self.from_first(self._stops(stopping_criteria, ids_BT, draw.scores, modes_B))
            stopped_B = (step.rows.mode != Mode.IDLE) & stops_B
            for row in stopped_B.nonzero()[:, 0].tolist():
                decided.finish_reasons[row] = "stop"
            rows = step.rows._replace(mode=step.rows.mode.masked_fill(stopped_B, int(Mode.IDLE)))
            is_active_B = rows.mode != Mode.IDLE
            is_over = not bool(is_active_B.any())
            if not is_over or synced_gpus:
                hidden_BD = run.step(step.next_ND, rows.position, is_active_B)
                rows = rows._replace(position=rows.position + is_active_B)
        if streamer is not None:
            streamer.end()  # type: ignore[no-untyped-call]
        objects = [decided.objects(row, task) for row, task in enumerate(run.tasks)]
        if not generation_config.return_dict_in_generate:
            return decided.plain_results(run.tasks, ids_BT, objects)
        return Moondream3Generation(
            sequences=ids_BT,
            region_values=decided.values().to(ids_BT.device),
            objects=objects,
            finish_reasons=decided.finish_reasons,
            scores=tuple(draw.scores) if generation_config.output_scores else None,
            logits=tuple(draw.logits) if generation_config.output_logits else None,
            past_key_values=run.batch.past_key_values,
        )

    def _stops(self, criteria: StoppingCriteriaList, ids_BT: Tensor, scores: list[Tensor], modes_B: Tensor) -> Tensor:
        """Return which rows the caller's criteria end: `Rows` counts lengths itself, and only text ends by its ids."""
        stops_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                continue
            met_B = criterion(ids_BT, tuple(scores)).to(stops_B.device)
            stops_B |= met_B & (modes_B == Mode.TEXT) if isinstance(criterion, EosTokenCriteria) else met_B
        return stops_B


class Draw:
    """A `state.Draw` that asks transformers' logits processors; rows that write no text stay greedy."""

    def __init__(
        self, processors: LogitsProcessorList, config: GenerationConfig, agree: Callable[[Tensor], Tensor]
    ) -> None:
        """Make the draw; `agree` gives all processes that share the network what the first of them drew."""
        self.processors, self.config, self.agree = processors, config, agree
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
            probabilities_BV = scores_BV.softmax(dim=-1).nan_to_num(1.0)  # `DecidedRows.take` refuses rows of NaN
            token_B = self.agree(torch.multinomial(probabilities_BV, num_samples=1)[:, 0])
        else:
            token_B = scores_BV.argmax(dim=-1)
        writes_B = (rows.mode == Mode.TEXT) | (rows.mode == Mode.REASON)
        return torch.where(writes_B, token_B, greedy_B)
