"""Losses of hidden states as terms: DistilBERT's three, projections, relations; in float64."""

import pytest
import torch
import torch.nn.functional as F
from tiny_lms import V, batch, tiny
from transformers import BertConfig, BertForMaskedLM

from fastkd import rkd_angle_loss, rkd_distance_loss
from fastkd.recipes import LM, Distil, Hidden, Outputs, Plus, Recipe, train
from fastkd.recipes.hidden import evenly_spaced


def bert(seed, layers):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_attention_heads=2, intermediate_size=32)
    config = BertConfig(vocab_size=V, num_hidden_layers=layers, **sizes)
    return BertForMaskedLM(config).double().eval()


def padded(rows=4, length=10):
    """A batch with padding on the right, as many rows as lengths."""
    inputs = batch(rows=rows, length=length)
    for row in range(rows):
        inputs["attention_mask"][row, length - row :] = 0
        inputs["labels"][row, length - row :] = -100
    return inputs


def masked(rows=4):
    """As a collator of masked language models makes it."""
    inputs = padded(rows)
    chosen = torch.rand(inputs["labels"].shape, generator=torch.Generator().manual_seed(2)) < 0.4
    chosen &= inputs["attention_mask"] != 0
    labels = inputs["input_ids"].masked_fill(~chosen, -100)
    return inputs | {"input_ids": inputs["input_ids"].masked_fill(chosen, 4), "labels": labels}


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_the_three_losses_of_distilbert(pieces):
    """Each is the number that torch gives on the whole batch, however it is cut."""
    student, teacher, inputs = bert(0, 2), bert(1, 4), masked()
    T, alpha, weight = 2.0, 0.6, 0.3
    objective = Plus(
        Distil(shift=False, temperature=T, alpha=alpha), Hidden("cosine", layers={-1: -1}), weight
    )
    given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    s = student(**given, output_hidden_states=True)
    with torch.no_grad():
        t = teacher(**given, output_hidden_states=True)
    counts, tokens = inputs["labels"] != -100, inputs["attention_mask"] != 0
    z_s, z_t = s.logits[counts], t.logits[counts]
    ce = F.cross_entropy(z_s, inputs["labels"][counts])
    kl = F.kl_div(
        F.log_softmax(z_s / T, -1), F.log_softmax(z_t / T, -1), reduction="batchmean",
        log_target=True,
    )  # fmt: skip
    pair = s.hidden_states[-1][tokens], t.hidden_states[-1][tokens]
    cosine = F.cosine_embedding_loss(*pair, torch.ones(len(pair[0])))
    loss = alpha * T**2 * kl + (1 - alpha) * ce + weight * cosine
    loss.backward()
    expected = {
        k: p.detach() - p.grad if p.grad is not None else p.detach()
        for k, p in student.named_parameters()
    }
    student.zero_grad()

    rows = zip(*(x.chunk(pieces) for x in inputs.values()), strict=True)
    step = [dict(zip(inputs, row, strict=True)) for row in rows]
    optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
    (row,) = train(LM(student), Recipe([step], LM(teacher), objective), optimizer, steps=1)
    for name, x in (("loss", loss), ("ce", ce), ("kd", kl), ("cosine", cosine)):
        assert row[name] == pytest.approx(x.item(), rel=1e-7), name
    torch.testing.assert_close({k: p.detach() for k, p in student.named_parameters()}, expected)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_a_projection_is_learnt_along(kind):
    """Of all layers, evenly spaced; and what stands in padding is not seen."""
    student, teacher = tiny(0, num_hidden_layers=2), tiny(1, hidden_size=24, num_hidden_layers=4)
    student, teacher, inputs = student.double(), teacher.double().eval(), padded()
    torch.manual_seed(0)
    term = Hidden.between(student, LM(teacher), kind).double()
    assert term.projection.weight.shape == (24, 16)
    given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    s = student(**given, output_hidden_states=True).hidden_states
    with torch.no_grad():
        t = teacher(**given, output_hidden_states=True).hidden_states
    tokens, total = inputs["attention_mask"] != 0, 0
    for i, j in ((1, 2), (2, 4)):
        x, y = term.projection(s[i][tokens]), t[j][tokens]
        total = (
            total
            + (F.mse_loss(x, y) if kind == "mse" else 1 - F.cosine_similarity(x, y).mean()) / 2
        )
    parameters = [term.projection.weight, student.model.embed_tokens.weight]
    expected = torch.autograd.grad(total, parameters)

    rows = zip(*(x.chunk(2) for x in inputs.values()), strict=True)
    step = [dict(zip(inputs, row, strict=True)) for row in rows]
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD([*student.parameters(), *term.parameters()], lr=1.0)
    (row,) = train(LM(student), Recipe([step], LM(teacher), term), optimizer, steps=1)
    assert row["loss"] == row[kind] == pytest.approx(total.item(), rel=1e-7)
    changes = [old - new.detach() for old, new in zip(before, parameters, strict=True)]
    torch.testing.assert_close(changes, list(expected))


def test_no_projection_where_widths_agree():
    assert Hidden.between(tiny(0), tiny(1), "mse").projection is None
    assert not list(Hidden("mse", projection=(16, 16)).parameters())
    assert Hidden.between(tiny(0), tiny(1, hidden_size=24), "rkd").projection is None


def test_relations_of_sequences():
    """Of their mean states, inside of a micro-batch; weighted by its sequences."""
    student, teacher, inputs = tiny(0).double(), tiny(1, hidden_size=24).double(), padded()
    given = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        s, t = (m(**given, output_hidden_states=True).hidden_states[-1] for m in (student, teacher))
    tokens = inputs["attention_mask"][..., None]
    s, t = ((x * tokens).sum(1) / tokens.sum(1) for x in (s, t))

    def relation(rows):
        return rkd_distance_loss(s[rows], t[rows]) + 2 * rkd_angle_loss(s[rows], t[rows])

    term, parts = Hidden("rkd", layers={-1: -1}), []
    for cut in ([4], [3, 1], [1, 1, 1, 1]):
        pieces = [
            dict(zip(inputs, x, strict=True))
            for x in zip(*(x.split(cut) for x in inputs.values()), strict=True)
        ]
        n = sum(term.counts(piece) for piece in pieces)
        assert n.tolist() == [4]
        parts.append(
            sum(
                term(LM(student)(p, True), LM(teacher)(p, True), p, n).loss.detach() for p in pieces
            )
        )
    every, three = relation(slice(0, 4)), relation(slice(0, 3))
    torch.testing.assert_close(torch.stack(parts), torch.stack([every, 0.75 * three, 0 * every]))


def test_layers_are_spaced_evenly_last_to_last():
    assert evenly_spaced(6, 12) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}
    assert evenly_spaced(3, 4) == {1: 1, 2: 2, 3: 4}
    assert evenly_spaced(2, 2) == {1: 1, 2: 2}


def test_a_micro_batch_without_a_token_adds_nothing():
    """Even of states that are no numbers."""
    inputs = padded(rows=2) | {"attention_mask": torch.zeros(2, 10)}
    for kind in ("cosine", "mse", "rkd"):
        term = Hidden(kind, projection=None if kind == "rkd" else torch.nn.Linear(16, 16))
        s = torch.full((2, 10, 16), torch.nan, requires_grad=True)
        outputs = Outputs(hidden_states=(s, s))
        teacher = Outputs(hidden_states=(s.detach(), s.detach()))
        loss = term(outputs, teacher, inputs, torch.tensor([5])).loss
        loss.backward()
        assert loss == 0 and (s.grad == 0).all(), kind


def test_which_positions_are_text():
    inputs = padded(rows=2)
    term = Hidden()
    assert term.counts(inputs) == 19
    assert term.counts({k: x for k, x in inputs.items() if k != "attention_mask"}) == 20
    blocks = inputs | {"attention_mask": torch.ones(2, 1, 10, 10)}
    assert term.counts(blocks) == (inputs["labels"] != -100).sum()


def test_what_a_term_refuses():
    with pytest.raises(ValueError, match="kind must be one of cosine, mse, rkd, got 'l1'"):
        Hidden("l1")
    with pytest.raises(ValueError, match="takes no projection"):
        Hidden("rkd", projection=(16, 24))
    with pytest.raises(TypeError, match="module or two widths, got float"):
        Hidden("mse", projection=0.5)
    with pytest.raises(ValueError, match="layers is empty"):
        Hidden(layers={})
    inputs, student = batch(), LM(tiny(0))
    heard, n = student(inputs, True), torch.tensor([9])
    with pytest.raises(ValueError, match="this teacher gives none"):
        Hidden()(heard, student(inputs), inputs, n)
    with pytest.raises(ValueError, match="there is no teacher"):
        Hidden()(heard, None, inputs, n)
    with torch.no_grad():
        says = student(inputs, True)
        wide = LM(tiny(1, hidden_size=24))(inputs, True)
    with pytest.raises(ValueError, match="the teacher has states 0 .* to 2, not 3"):
        Hidden(layers={1: 3})(heard, says, inputs, n)
    with pytest.raises(ValueError, match="the widths differ: student 16, teacher 24"):
        Hidden("mse")(heard, wide, inputs, n)
