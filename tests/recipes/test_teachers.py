"""Teachers made of others: mixtures, and a teacher that sees another prompt, in float64."""

import pytest
import torch
import torch.nn.functional as F
from tiny_lms import V, batch, gradients, tiny

from fastkd import kd_loss
from fastkd.recipes import LM, Distil, Mixture, Outputs, Plus, Prompted, Recipe, train
from fastkd.recipes.hidden import Hidden
from fastkd.sources import TopK

T = 2.0


def model(seed, **others):
    return tiny(seed, **others).double().eval()


def learn(teacher, inputs, logits="auto", **settings):
    """(loss, gradients) of one step of a student."""
    student = model(0)
    objective = Distil(temperature=T, **settings)
    with torch.no_grad():
        says = teacher(inputs)
    loss = objective(LM(student, logits)(inputs), says, inputs, objective.counts(inputs)).loss
    loss.backward()
    return loss.detach(), gradients(student)


def by_hand(p_of, inputs):
    """KL(p‖q) T² from the probabilities (n, V) that `p_of` gives for the rows that count."""
    student, labels = model(0), inputs["labels"][:, 1:]
    z = student(input_ids=inputs["input_ids"]).logits[:, :-1][labels != -100]
    with torch.no_grad():
        p = p_of(labels != -100)
    loss = T**2 * F.kl_div(F.log_softmax(z / T, -1), p, reduction="batchmean")
    loss.backward()
    return loss.detach(), gradients(student)


@pytest.mark.parametrize("mode", ["probabilities", "logits"])
def test_a_mixture_of_different_widths(mode):
    teachers, inputs = [model(1), model(2, hidden_size=24)], batch()

    def mixed(counts):
        logits = [t(input_ids=inputs["input_ids"]).logits[:, :-1][counts] / T for t in teachers]
        if mode == "logits":
            return (0.25 * logits[0] + 0.75 * logits[1]).softmax(-1)
        return 0.25 * logits[0].softmax(-1) + 0.75 * logits[1].softmax(-1)

    mixture = Mixture([LM(t) for t in teachers], weights=[1, 3], mode=mode)
    expected = by_hand(mixed, inputs)
    for logits in ("auto", "whole"):
        torch.testing.assert_close(learn(mixture, inputs, logits), expected)


def test_a_mixture_of_unequal_vocabularies():
    teachers, inputs = [model(1), model(2, vocab_size=V + 5)], batch()
    mixture = Mixture([LM(t) for t in teachers])
    with pytest.raises(ValueError, match="the vocabularies differ"):
        learn(mixture, inputs)

    def mixed(counts):
        logits = [t(input_ids=inputs["input_ids"]).logits[:, :-1][counts] for t in teachers]
        return sum((z[:, :V] / T).softmax(-1) for z in logits) / 2

    torch.testing.assert_close(learn(mixture, inputs, vocab="shared"), by_hand(mixed, inputs))


def test_what_a_mixture_cannot_be():
    one, inputs = LM(model(1)), batch()
    for wrong, message in (
        (dict(weights=[1, 2, 3]), "2 teachers, but 3 weights"),
        (dict(weights=[1, -1]), "not negative"),
        (dict(mode="mean"), "got 'mean'"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture([one, one], **wrong)
    with pytest.raises(TypeError, match="list of teachers"):
        Mixture([])
    with pytest.raises(ValueError, match="2 teachers has no hidden states"):
        Mixture([one, one])(inputs, hidden_states=True)
    both = prompted(inputs, inputs["input_ids"][:, :1])
    with pytest.raises(ValueError, match=r"Prompted\(Mixture"):
        Mixture([one, Prompted(one)])(both)


def prompted(inputs, prompt):
    """The teacher reads (N, k) other tokens before the same rows."""
    N, k = prompt.shape
    none = torch.full((N, k), -100)
    labels = inputs["labels"].clone()
    labels[:, 0] = -100  # its logits would be of the prompt's last token
    return inputs | {
        "teacher_input_ids": torch.cat([prompt, inputs["input_ids"]], 1),
        "teacher_attention_mask": torch.ones(N, k + labels.shape[1], dtype=torch.long),
        "teacher_labels": torch.cat([none, labels], 1),
    }


@pytest.mark.parametrize("logits", ["auto", "whole"])
def test_the_same_prompt_on_both_sides_is_the_plain_recipe(logits):
    teacher, inputs = model(1), batch()
    both = prompted(inputs, inputs["input_ids"][:, :0])
    plain = learn(LM(teacher, logits), inputs, logits, alpha=0.7)
    ours = learn(Prompted(LM(teacher, logits)), both, logits, alpha=0.7)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("logits", ["auto", "whole"])
def test_another_prompt(logits):
    """Also with a mixture that sees it."""
    teacher, inputs = model(1), batch(rows=3)
    prompt = torch.randint(V, (3, 4), generator=torch.Generator().manual_seed(9))
    both = prompted(inputs, prompt)

    def answered(counts):
        z = teacher(input_ids=both["teacher_input_ids"]).logits[:, 4:-1][counts]
        return (z / T).softmax(-1)

    expected = by_hand(answered, inputs)
    says = LM(teacher, logits)
    torch.testing.assert_close(learn(Prompted(says), both, logits), expected)
    torch.testing.assert_close(learn(Prompted(Mixture([says, says])), both, logits), expected)
    assert expected[0] != learn(says, inputs, logits)[0]


def test_a_prompted_teacher_in_the_loop():
    """Micro-batches of unequal targets, each side padded on its own."""
    found = []
    for pieces in (1, 3):
        student, teacher = model(0), Prompted(LM(model(1)))
        whole = prompted(batch(rows=3), torch.ones(3, 2, dtype=torch.long))
        chunks = zip(*(x.chunk(pieces) for x in whole.values()), strict=True)
        parts = [dict(zip(whole, x, strict=True)) for x in chunks]
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        history = train(LM(student), Recipe([parts], teacher, Distil()), optimizer, steps=1)
        found.append((history[0]["loss"], dict(student.named_parameters())))
    torch.testing.assert_close(*found)


def test_responses_that_differ_are_named():
    teacher, inputs = Prompted(LM(model(1))), batch(rows=3)
    both = prompted(inputs, torch.ones(3, 2, dtype=torch.long))
    shorter = both["teacher_labels"].clone()
    shorter[1, -1] = -100
    with pytest.raises(ValueError, match="row 1: 5 positions count for the student, 4 for the"):
        teacher(both | {"teacher_labels": shorter})
    other = both["teacher_labels"].clone()
    other[2, -1] = (other[2, -1] + 1) % V
    with pytest.raises(ValueError, match="row 2: label 1 that counts is"):
        teacher(both | {"teacher_labels": other})
    # As many in all, but of other rows.
    moved = shorter.clone()
    moved[0, 2] = 3
    with pytest.raises(ValueError, match="row 0"):
        teacher(both | {"teacher_labels": moved})
    with pytest.raises(ValueError, match="reads teacher_input_ids, and the batch has only"):
        teacher(inputs)
    with pytest.raises(ValueError, match="its hidden states cannot be compared"):
        teacher(both, hidden_states=True)
    inputs = batch()
    with pytest.raises(ValueError, match=r"13 positions .* leading shape \(3,\)"):
        objective = Distil()
        says = Outputs(torch.zeros(3, V).double(), counted=True)
        objective(LM(model(0))(inputs), says, inputs, objective.counts(inputs))


def test_a_teacher_of_ones_own():
    """Whatever returns `Outputs`: a list of its likeliest tokens, with weights that vary."""
    from fastkd import Ensemble

    live, inputs = model(1), batch()
    weight = torch.rand(2, 9, generator=torch.Generator().manual_seed(0)).double()

    def says(batch, hidden_states=False):
        logprobs, ids = live(input_ids=batch["input_ids"]).logits.log_softmax(-1).topk(V)
        listed = TopK(ids, logprobs, tail="renormalize")
        return Outputs(Ensemble([listed, LM(live)(batch).logits], [weight, 1.0]))

    found = []
    for logits in ("auto", "whole"):
        loss, grads = learn(lambda batch: says(batch), inputs, logits)
        found.append((loss, grads))
    torch.testing.assert_close(*found)
    student, labels = model(0), inputs["labels"]
    with torch.no_grad():
        z_s = student(input_ids=inputs["input_ids"]).logits
        whole = kd_loss(z_s, says(inputs).logits, labels, shift=True, temperature=T)
    torch.testing.assert_close(found[0][0], whole)


def test_a_loss_of_hidden_states_refuses_a_mixture_in_the_loop():
    objective = Plus(Distil(), Hidden("cosine"))
    teacher = Mixture([LM(model(1)), LM(model(2))])
    student = model(0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="has no hidden states"):
        train(LM(student), Recipe([[batch()]], teacher, objective), optimizer, steps=1)
