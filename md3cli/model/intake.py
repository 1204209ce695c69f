"""A job becomes a sequence: its prompt built, its length looked at before anything is computed."""

from __future__ import annotations

from md3cli.errors import RequestError
from md3cli.model.config import ModelConfig
from md3cli.model.prompts import Prompts
from md3cli.model.tasks import Job, Sequence


def take_in(job: Job, prompts: Prompts, config: ModelConfig, max_context: int) -> Sequence:
    """The sequence of a job.

    Raises:
        RequestError: no prompt can be made of the request, or it does not fit the context.
    """
    prompt = prompts.build(job.request, has_image=job.image is not None)
    choices = prompts.encode_choices(job.request)
    length = len(prompt.ids) + max(map(len, choices), default=0)
    length += config.prefix_len if job.image is not None else 0
    if length > max_context:
        raise RequestError(
            f"the prompt needs {length} positions and the context holds {max_context}; "
            "shorten it or raise --max-context"
        )
    return Sequence(job, prompt, config, choices=choices)
