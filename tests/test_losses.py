"""The losses against enumerated expectations, and their mathematical properties."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from effopd import chunked, group_advantages, policy_gradient, reverse_kl, reverse_kl_sampled, reverse_kl_top_k

V, B, T = 7, 3, 5
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]])


def sampled(student, teacher, mask, **options):
    return reverse_kl_sampled(student, teacher, torch.zeros(mask.shape, dtype=torch.long), mask, 1.0, **options)


def top_3(student, teacher, mask, **options):
    return reverse_kl_top_k(student, teacher, mask, 3, **options)


LOSSES = [reverse_kl, sampled, top_3]


def logits(seed, *shape):
    return torch.randn(*(shape or (B, T, V)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


def test_reverse_kl_equals_torch_distributions():
    student, teacher = logits(0), logits(1)
    kl = torch.distributions.kl_divergence(torch.distributions.Categorical(logits=student),
                                           torch.distributions.Categorical(logits=teacher))             # KL(π || π*)
    assert reverse_kl(student, teacher, MASK).item() == pytest.approx(kl[MASK.bool()].mean().item(), abs=1e-6)


def test_equal_models_have_no_divergence_even_for_one_token():
    student = logits(0)
    one = torch.zeros(B, T)
    one[1, 2] = 1
    for mask in (MASK, one):
        assert reverse_kl(student, student, mask).abs() < 1e-7
        assert reverse_kl_top_k(student, student, mask, 2).abs() < 1e-7
        assert reverse_kl_sampled(student, student, student.argmax(-1), mask) == 0


@pytest.mark.parametrize("loss", LOSSES)
def test_only_the_student_gets_a_gradient_and_only_under_the_mask(loss):
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    loss(student, teacher, MASK).backward()
    assert teacher.grad is None
    assert torch.equal(student.grad.abs().sum(-1) > 0, MASK.bool())


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_outside_the_mask_does_not_matter(loss):
    student, teacher = logits(0), logits(1)
    expected = loss(student, teacher, MASK)
    for side in (student, teacher):
        side[MASK == 0] = logits(2)[MASK == 0]
    assert loss(student, teacher, MASK) == expected


def test_an_empty_mask_gives_zero_not_nan():
    assert reverse_kl(logits(0), logits(1), torch.zeros(B, T)) == 0


def test_bf16_logits_are_scored_in_float32():
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    expected = reverse_kl(student.double(), teacher.double(), MASK)
    for loss in (reverse_kl(student, teacher, MASK), reverse_kl_top_k(student, teacher, MASK, V)):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_micro_batches_add_up_to_the_batch(loss):
    student, teacher = logits(0).requires_grad_(), logits(1)
    loss(student, teacher, MASK).backward()
    whole, student.grad = student.grad, None
    for row in range(B):                                      # rows of 5, 2 and 1 tokens
        rows = slice(row, row + 1)
        loss(student[rows], teacher[rows], MASK[rows], num_tokens=MASK.sum()).backward()
    torch.testing.assert_close(student.grad, whole, atol=1e-7, rtol=0)


def test_expected_sampled_gradient_is_the_full_gradient():
    """Σ_y π(y) · gradient of the sampled form at y, over every y: pitfall 11."""
    student, teacher = logits(0, 1, 1, V).requires_grad_(), logits(1, 1, 1, V)
    mask = torch.ones(1, 1)
    reverse_kl(student, teacher, mask).backward()
    full, student.grad = student.grad, None
    p = F.softmax(student.detach(), -1)[0, 0]
    for y in range(V):
        (p[y] * reverse_kl_sampled(student, teacher, torch.tensor([[y]]), mask)).backward()
    torch.testing.assert_close(student.grad, full, atol=1e-5, rtol=0)
    assert full.abs().max() > 0.01


def test_discount_one_is_the_exact_gradient_between_sequences():
    """Answers of up to 3 tokens over {a, b, end}, all of them enumerated; logits are a table of the prefix."""
    end, length = 2, 3
    answers = [y for n in range(1, length + 1) for y in itertools.product(range(3), repeat=n)
               if end not in y[:-1] and (y[-1] == end or n == length)]
    prefixes = sorted({y[:t] for y in answers for t in range(len(y))})
    student = logits(0, len(prefixes), 3).requires_grad_()
    teacher = logits(1, len(prefixes), 3)

    def rows(table, y):                                       # logits along one answer: (1, T, 3)
        return table[[prefixes.index(y[:t]) for t in range(len(y))]][None]

    def sequence_log_prob(table, y):
        return F.log_softmax(rows(table, y)[0], -1)[range(len(y)), list(y)].sum()

    log_p = torch.stack([sequence_log_prob(student, y) for y in answers])
    log_q = torch.stack([sequence_log_prob(teacher, y) for y in answers])
    assert log_p.exp().sum().item() == pytest.approx(1)
    (log_p.exp() * (log_p - log_q)).sum().backward()          # KL between distributions over whole answers
    exact, student.grad = student.grad, None

    def expected_gradient(discount):
        for y, p in zip(answers, log_p.detach().exp()):
            loss = reverse_kl_sampled(rows(student, y), rows(teacher, y), torch.tensor([y]), torch.ones(1, len(y)),
                                      discount, num_tokens=1)
            (p * loss).backward()
        gradient, student.grad = student.grad, None
        return gradient

    torch.testing.assert_close(expected_gradient(1.0), exact, atol=1e-5, rtol=0)
    assert (expected_gradient(0.0) - exact).abs().max() > 0.01     # discount 0 is another, cheaper objective


def test_the_sampled_coefficient_is_detached():
    student, teacher = logits(0, 1, 1, V).requires_grad_(), logits(1, 1, 1, V)
    reverse_kl_sampled(student, teacher, torch.tensor([[2]]), torch.ones(1, 1)).backward()
    log_p, log_q = F.log_softmax(student.detach(), -1)[0, 0], F.log_softmax(teacher, -1)[0, 0]
    expected = (log_p[2] - log_q[2]) * (F.one_hot(torch.tensor(2), V) - log_p.exp())
    torch.testing.assert_close(student.grad[0, 0], expected, atol=1e-6, rtol=0)


def test_top_k_is_a_coarser_divergence():
    student, teacher = logits(0, 50, 4, V), logits(1, 50, 4, V)
    mask = torch.ones(50, 4)
    values = []
    for k in range(1, V + 1):
        each = torch.stack([reverse_kl_top_k(student[i:i + 1], teacher[i:i + 1], mask[i:i + 1], k) for i in range(50)])
        full = torch.stack([reverse_kl(student[i:i + 1], teacher[i:i + 1], mask[i:i + 1]) for i in range(50)])
        assert (each >= 0).all() and (each <= full + 1e-6).all()
        values.append(each.mean().item())
    assert values == sorted(values) and values[0] < values[-1]     # finer buckets see more
    assert values[-1] == pytest.approx(reverse_kl(student, teacher, mask).item(), abs=1e-6)


def test_top_k_by_hand():
    student, teacher = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    value = reverse_kl_top_k(student.log()[None, None], teacher.log()[None, None], torch.ones(1, 1), 1)
    assert value.item() == pytest.approx(0.7 * math.log(0.7 / 0.5) + 0.3 * math.log(0.3 / 0.5), abs=1e-6)


def test_group_advantages_by_hand():
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0])
    advantages = group_advantages(rewards, 4)
    assert advantages[:4].tolist() == pytest.approx([3 ** 0.5] + [-(3 ** -0.5)] * 3, rel=1e-4)  # mean 1/4, sd sqrt(3)/4
    assert advantages[4:8].tolist() == pytest.approx([1, 1, -1, -1], rel=1e-4)
    assert not advantages[8:].any()                           # all right or all wrong teaches nothing


def test_policy_gradient_by_hand():
    """Gradient at a token: -A (onehot(y) - π) / number of tokens; none outside the mask."""
    student = logits(0).requires_grad_()
    tokens, advantages = torch.arange(B * T).view(B, T) % V, torch.tensor([2.0, -1.0, 0.0])
    policy_gradient(student, tokens, advantages, MASK).backward()
    p = F.softmax(student.detach(), -1)
    expected = -advantages[:, None, None] * (F.one_hot(tokens, V) - p) * MASK[..., None] / 8
    torch.testing.assert_close(student.grad, expected, atol=1e-6, rtol=0)


def test_expected_policy_gradient_is_the_gradient_of_the_expected_reward():
    student, reward = logits(0, 1, 1, V).requires_grad_(), torch.arange(float(V)).square()
    (F.softmax(student, -1)[0, 0] @ -reward.double()).backward()
    exact, student.grad = student.grad, None
    p = F.softmax(student.detach(), -1)[0, 0]
    for y in range(V):                                        # a baseline, as the group's mean is, does not matter
        (p[y] * policy_gradient(student, torch.tensor([[y]]), reward[y:y + 1] - 7.0, torch.ones(1, 1))).backward()
    torch.testing.assert_close(student.grad, exact, atol=1e-5, rtol=1e-5)


# Losses that never hold all logits.

CHUNKED = {
    "full": lambda z, q: reverse_kl(z, q, torch.ones(len(z)), 11),
    "top k": lambda z, q: reverse_kl_top_k(z, q, torch.ones(len(z)), 3, 11),
    "sampled": lambda z, q: reverse_kl_sampled(z, q, q.argmax(-1), torch.ones(len(z)), num_tokens=11),
}


@pytest.mark.parametrize("size", [1, 4, 11, 64])
@pytest.mark.parametrize("name", CHUNKED)
def test_chunks_have_the_value_and_gradient_of_the_whole(name, size):
    N, C = 11, 6
    hidden, head, teacher = logits(0, N, C).float(), logits(1, V, C).float(), logits(2, N, V).float()

    def gradients(loss):
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        value = loss(h, w)
        (3 * value).backward()                                # what comes from above must reach the gradients
        return value.detach(), h.grad, w.grad

    whole = gradients(lambda h, w: CHUNKED[name](h @ w.T, teacher))
    pieces = gradients(lambda h, w: chunked(CHUNKED[name], h, w, teacher, chunk_size=size))
    for a, b in zip(whole, pieces):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(chunked(CHUNKED[name], hidden, head, teacher, chunk_size=size), whole[0])


def test_chunks_of_nothing_are_nothing():
    hidden, head = torch.zeros(0, 6, requires_grad=True), torch.randn(V, 6, requires_grad=True)
    chunked(CHUNKED["full"], hidden, head, torch.zeros(0, V)).backward()
    assert head.grad.abs().sum() == 0


def test_chunks_hold_no_more_logits_than_they_say():
    seen = []

    def loss(z, y):
        seen.append(tuple(z.shape))
        return z.sum()

    chunked(loss, torch.randn(10, 6, requires_grad=True), torch.randn(V, 6), torch.zeros(10), chunk_size=4)
    assert seen == [(4, V), (4, V), (2, V)]


def test_chunks_add_up_a_bf16_heads_gradient_in_float32():
    hidden, head = torch.ones(4096, 1, dtype=torch.bfloat16), torch.ones(V, 1, dtype=torch.bfloat16, requires_grad=True)
    chunked(lambda z, _: z.float().sum(), hidden, head, hidden, chunk_size=1).backward()
    assert head.grad.float().unique().tolist() == [4096.0]    # in bfloat16 the sum would end at 256
