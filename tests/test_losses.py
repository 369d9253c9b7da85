"""The losses against enumerated expectations, and their mathematical properties."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical, kl_divergence

from effopd import (chunked, group_advantages, policy_gradient, reverse_kl, reverse_kl_sampled,
                    reverse_kl_top_k)

V, B, T = 7, 3, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])


def top_3(z, q, mask, n=None):
    return reverse_kl_top_k(z, q, mask, 3, n)


def sampled(z, q, mask, n=None):
    return reverse_kl_sampled(z, q, q.argmax(-1), mask, 0.0, n)


def sequence(z, q, mask, n=None):
    return reverse_kl_sampled(z, q, q.argmax(-1), mask, 1.0, n)


def logits(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (B, T, V)), generator=generator, dtype=torch.float64) * 2


def gradient(loss, student):
    """∂ loss(student) / ∂ student."""
    student = student.detach().clone().requires_grad_()
    loss(student).backward()
    return student.grad


def test_reverse_kl_equals_torch_distributions():
    student, teacher = logits(0), logits(1)
    kl = kl_divergence(Categorical(logits=student), Categorical(logits=teacher))
    expected = kl[MASK.bool()].mean().item()                  # KL(π || π*), not the other way round
    assert reverse_kl(student, teacher, MASK).item() == pytest.approx(expected, abs=1e-6)
    assert reverse_kl(student, teacher).item() == pytest.approx(kl.mean().item(), abs=1e-6)


def test_a_token_that_both_models_rule_out_counts_0():
    student, teacher = logits(0), logits(1)
    without = reverse_kl(student[..., 1:], teacher[..., 1:], MASK)
    student[..., 0] = teacher[..., 0] = -torch.inf
    assert reverse_kl(student, teacher, MASK).item() == pytest.approx(without.item(), abs=1e-6)
    assert gradient(lambda z: reverse_kl(z, teacher, MASK), student).isfinite().all()


def test_equal_models_have_no_divergence_even_for_one_token():
    student, one = logits(0), torch.zeros(B, T)
    one[1, 2] = 1
    for mask in (MASK, one):
        assert reverse_kl(student, student, mask).abs() < 1e-7
        assert reverse_kl_top_k(student, student, mask, 2).abs() < 1e-7
        assert reverse_kl_sampled(student, student, student.argmax(-1), mask) == 0


@pytest.mark.parametrize("loss", [reverse_kl, top_3, sequence])
def test_only_the_student_learns_and_only_under_the_mask(loss):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    expected = loss(student, teacher, MASK)
    expected.backward()
    assert teacher.grad is None
    assert torch.equal(student.grad.abs().sum(-1) > 0, MASK.bool())
    outside = (MASK == 0)[..., None]
    student, teacher = (torch.where(outside, logits(2), z.detach()) for z in (student, teacher))
    assert loss(student, teacher, MASK) == expected
    assert loss(student, teacher, torch.zeros(B, T)) == 0     # not NaN


def test_bf16_logits_are_scored_in_float32():
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    expected = reverse_kl(student.double(), teacher.double(), MASK).item()
    for loss in (reverse_kl(student, teacher, MASK), reverse_kl_top_k(student, teacher, MASK, V)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_expected_sampled_gradient_is_the_full_gradient():
    student, teacher, mask = logits(0, 1, 1, V), logits(1, 1, 1, V), torch.ones(1, 1)
    full = gradient(lambda s: reverse_kl(s, teacher, mask), student)
    p, expected = F.softmax(student, -1)[0, 0], 0.0
    for y in range(V):                                        # every token, by its probability
        token = torch.tensor([[y]])
        expected += p[y] * gradient(lambda s: reverse_kl_sampled(s, teacher, token, mask), student)
    torch.testing.assert_close(expected, full, atol=1e-5, rtol=0)
    assert full.abs().max() > 0.01


def test_discount_one_is_the_exact_gradient_between_sequences():
    """Answers of up to 3 tokens over {a, b, end}, all listed; logits are a table of prefixes."""
    end = 2
    answers = [(end,), *((y, end) for y in (0, 1)),
               *((x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1, end))]
    prefixes = sorted({y[:t] for y in answers for t in range(len(y))})
    student, teacher = logits(0, len(prefixes), 3), logits(1, len(prefixes), 3)

    def along(table, y):                                      # logits at each token of y: (1, T, 3)
        return table[[prefixes.index(y[:t]) for t in range(len(y))]][None]

    def log_prob(table, y):
        return F.log_softmax(along(table, y)[0], -1)[range(len(y)), list(y)].sum()

    def kl_of_answers(table):
        log_p = torch.stack([log_prob(table, y) for y in answers])
        log_q = torch.stack([log_prob(teacher, y) for y in answers])
        assert log_p.exp().sum().item() == pytest.approx(1)
        return (log_p.exp() * (log_p - log_q)).sum()

    def expected(discount):
        total = 0.0
        for y in answers:
            inputs = along(teacher, y), torch.tensor([y]), torch.ones(1, len(y)), discount, 1
            found = gradient(lambda s: reverse_kl_sampled(along(s, y), *inputs), student)
            total += log_prob(student, y).exp() * found
        return total

    exact = gradient(kl_of_answers, student)
    torch.testing.assert_close(expected(discount=1.0), exact, atol=1e-5, rtol=0)
    assert (expected(discount=0.0) - exact).abs().max() > 0.01     # another, cheaper objective


def test_top_k_is_a_coarser_divergence_and_the_whole_one_at_k_equal_v():
    student, teacher = logits(0, 100, V), logits(1, 100, V)
    full = torch.stack([reverse_kl(s, q) for s, q in zip(student, teacher)])
    for k in range(1, V + 1):
        each = torch.stack([reverse_kl_top_k(s, q, None, k) for s, q in zip(student, teacher)])
        assert (each >= 0).all() and (each <= full + 1e-6).all()
    torch.testing.assert_close(each, full, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradient(lambda s: reverse_kl_top_k(s, teacher, None, V), student),
                               gradient(lambda s: reverse_kl(s, teacher), student))


def test_group_advantages_by_hand():
    advantages = group_advantages(torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0]), 4)
    first = [3 ** 0.5] + [-(3 ** -0.5)] * 3                   # mean 1/4, sd sqrt(3)/4
    assert advantages[:4].tolist() == pytest.approx(first, rel=1e-4)
    assert advantages[4:8].tolist() == pytest.approx([1, 1, -1, -1], rel=1e-4)
    assert not advantages[8:].any()                           # all right, all wrong: nothing learnt


def test_policy_gradient_by_hand():
    """Gradient at a token: -A (onehot(y) - π) / number of tokens; none outside the mask."""
    student, tokens = logits(0), torch.arange(B * T).view(B, T) % V
    advantages = torch.tensor([[2.0], [-1.0], [0.0]])
    found = gradient(lambda s: policy_gradient(s, tokens, advantages, MASK), student)
    difference = F.one_hot(tokens, V) - F.softmax(student, -1)
    expected = -advantages[..., None] * difference * MASK[..., None] / 8
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [1, 4, None])
@pytest.mark.parametrize("loss", [reverse_kl, top_3, sampled])
def test_chunks_have_the_value_and_gradient_of_the_whole(loss, size):
    hidden, head, teacher = logits(0, 11, 6), logits(1, V, 6), logits(2, 11, V)
    shapes = []

    def noted(z, q, mask):
        shapes.append(z.shape)
        return loss(z, q, mask, 11)

    def results(make):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        value = make(h, w, teacher, torch.ones(11))
        (3 * value).backward()                                # what comes from above must arrive
        return value.detach(), h.grad, w.grad

    pieces = results(lambda h, w, *rows: chunked(noted, h, w, *rows, chunk_size=size))
    assert all(len(shape) == 2 and shape[0] <= (size or 11) for shape in shapes)
    assert sum(shape[0] for shape in shapes) == 2 * 11        # made again in the backward pass
    whole = results(lambda h, w, *rows: noted(h @ w.T, *rows))
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-6)


def test_a_float32_heads_gradient_is_added_up_in_float32():
    hidden, head = torch.ones(512, 1, dtype=torch.bfloat16), torch.ones(V, 1, requires_grad=True)
    chunked(lambda z: z.float().sum(), hidden, head, chunk_size=1).backward()
    assert head.grad.unique().tolist() == [512.0]             # in bfloat16 the sum would end at 256
