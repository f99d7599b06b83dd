"""Hidden states as what is learnt."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastkd.hidden import cosine_loss, hidden_mse_loss, rkd_angle_loss, rkd_distance_loss
from fastkd.recipes.lm import LM, causal_lm
from fastkd.recipes.objectives import IGNORED
from fastkd.recipes.recipe import Batch, Learnt, Outputs

KINDS = ("cosine", "mse", "rkd")
ANGLES = 2.0  # the angles' weight beside the distances', as in Park et al. (2019)


class Hidden(nn.Module):
    """A loss between hidden states of the student's layers and the teacher's, averaged over pairs
    of layers. A term to add: `Plus(Distil(), Hidden("mse", layers={2: 4}), 0.1)`.

        "cosine"  1 - cosine, per token (`cosine_loss`)
        "mse"     mean squared difference, per token (`hidden_mse_loss`)
        "rkd"     distances + 2 · angles between the sequences of a micro-batch, each the mean of
                  its tokens (`rkd_distance_loss`, `rkd_angle_loss`); of any widths

    Tokens are those of `attention_mask`, where it is (N, length); all, where there is none; those
    with a label where it is something else (packed documents).

    The average is over the tokens of the step, so accumulation changes nothing. With "rkd" it is
    over the step's sequences, each with the relations inside of its micro-batch: those between
    micro-batches are not seen, and a micro-batch of one sequence has none.

    Args:
        kind: see above.
        layers: {student's layer: teacher's layer}, as positions in `hidden_states`: 0 the
            embeddings, 1 the first layer, -1 the last. None: every layer of the student, with the
            teacher's evenly spaced, last to last.
        projection: of "cosine" and "mse", what makes the student's states as wide as the
            teacher's, one for all layers: a module; or the two widths, (H_student, H_teacher), of
            which an `nn.Linear` is made where they differ. Its parameters belong in the optimizer:
            `[*student.parameters(), *objective.parameters()]`. See `between`.

    Raises:
        ValueError, TypeError: an unknown kind, a projection with "rkd". In a call: a teacher that
            gives no hidden states, a layer that there is not, and what the losses refuse.

    Measures: the loss, under the name of its kind.
    """

    hidden_states = True
    logits = False  # it reads none: see `Plus`

    def __init__(
        self,
        kind: str = "cosine",
        *,
        layers: Mapping[int, int] | None = None,
        projection: nn.Module | tuple[int, int] | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if layers is not None and not layers:
            raise ValueError("layers is empty: name a pair of layers, or leave it out")
        if kind == "rkd" and projection is not None:
            raise ValueError("rkd compares states of any widths: it takes no projection")
        if isinstance(projection, tuple):
            same = projection[0] == projection[1]
            projection = None if same else nn.Linear(*projection)
        if projection is not None and not isinstance(projection, nn.Module):
            raise TypeError(
                f"projection must be a module or two widths, got {type(projection).__name__}"
            )
        self.kind, self.projection = kind, projection
        self.layers = None if layers is None else dict(layers)

    @classmethod
    def between(
        cls,
        student: LM | nn.Module,
        teacher: LM | nn.Module,
        kind: str = "cosine",
        layers: Mapping[int, int] | None = None,
    ) -> Hidden:
        """One for these two models: with a projection where their widths differ, on the student's
        device."""
        models = [x.model if isinstance(x, LM) else x for x in (student, teacher)]
        widths = tuple((causal_lm(x) or x).config.get_text_config().hidden_size for x in models)
        made = cls(kind, layers=layers, projection=None if kind == "rkd" else widths)
        return made.to(next(models[0].parameters()).device)

    def counts(self, batch: Batch) -> Tensor:
        tokens = _tokens(batch)
        return (tokens.any(-1) if self.kind == "rkd" else tokens).sum()[None]

    def forward(
        self,
        student: Outputs,
        teacher: Outputs | None,
        batch: Batch,
        num_items: Tensor,
        progress: float = 0.0,
    ) -> Learnt:
        pairs = self._pairs(_states("student", student), _states("teacher", teacher))
        tokens, total = _tokens(batch), num_items[0].clamp(min=1)
        losses = [self._loss(s, t.detach(), tokens) for s, t in pairs]
        loss = sum(losses) / (len(losses) * total)
        return Learnt(loss, {self.kind: loss.detach()})

    def _pairs(self, students: tuple, teachers: tuple) -> list[tuple[Tensor, Tensor]]:
        layers = self.layers or evenly_spaced(len(students) - 1, len(teachers) - 1)
        for side, states, used in (
            ("student", students, layers.keys()),
            ("teacher", teachers, layers.values()),
        ):
            for layer in used:
                if not -len(states) <= layer < len(states):
                    raise ValueError(
                        f"the {side} has states 0 (of the embeddings) to {len(states) - 1}, not"
                        f" {layer}"
                    )
        return [(students[s], teachers[t]) for s, t in layers.items()]

    def _loss(self, s: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """The sum over what `counts` counts."""
        if self.kind == "mse":
            return hidden_mse_loss(s, t, tokens, projection=self.projection, reduction="sum")
        if self.kind == "cosine":
            if self.projection is not None:
                s = s.masked_fill(~tokens[..., None], 0)  # a NaN there would reach its gradient
                s = self.projection(s.to(next(self.projection.parameters()).dtype))
            return cosine_loss(s, t, tokens, reduction="sum")
        members = tokens.any(-1)
        s, t = _pooled(s, tokens), _pooled(t, tokens)
        loss = rkd_distance_loss(s, t, members) + ANGLES * rkd_angle_loss(s, t, members)
        return loss * members.sum()


def evenly_spaced(students: int, teachers: int) -> dict[int, int]:
    """Of so many layers, which of the teacher's stands for each of the student's: last to last."""
    return {i: i * teachers // students for i in range(1, students + 1)}


def _states(side: str, outputs: Outputs | None) -> tuple[Tensor, ...]:
    states = None if outputs is None else outputs.hidden_states
    if states is None:
        raise ValueError(
            f"a loss of hidden states needs the {side}'s: "
            + ("there is no teacher" if outputs is None else f"this {side} gives none")
        )
    return states


def _tokens(batch: Batch) -> Tensor:
    """(N, length) which positions hold text."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask != 0
    if mask is not None:
        return batch["labels"] != IGNORED
    return torch.ones_like(batch["input_ids"], dtype=torch.bool)


def _pooled(x: Tensor, tokens: Tensor) -> Tensor:
    """(N, H) means over each row's tokens, in fp32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x.masked_fill(~tokens[..., None], 0)
    return x.sum(1) / tokens.sum(1, keepdim=True).clamp(min=1)
