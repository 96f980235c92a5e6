"""Answers to the homework: right ones, as students write them, and wrong ones, each with the parts that it must lose.

A wrong answer is a right one with one piece of text changed. They are all kept here, apart from the project's own files, so that a
change of those leaves them alone. CHEATS are bodies that look for the answer elsewhere.
"""

import ast
import textwrap

import homework

# fmt: off
MODEL = {  # what is asked for, as a careful student writes it: {question: {function: body, or the part that is blank}}
    "q1": {
        "log_softmax_pair": """
            log_q = student_logits.log_softmax(-1, dtype=at_least_fp32)
            log_p = teacher_logits.detach().log_softmax(-1, dtype=at_least_fp32)
            return log_q, log_p""",
        "kl": """
            a = log_a.exp()
            ratio = torch.where(a > 0, log_a - log_b, 0.0)
            return (a * ratio).sum(-1)""",
        "forward_kl": """
            return kl(log_p, log_q)""",
        "reverse_kl": """
            return kl(log_q, log_p)""",
        "jsd": """
            neither = log_q.isneginf() & log_p.isneginf()
            safe_p, safe_q = log_p.masked_fill(neither, 0), log_q.masked_fill(neither, 0)
            log_m = torch.logaddexp(safe_p + math.log(beta), safe_q + math.log1p(-beta))
            return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)""",
    },
    "q2": {
        "completion_states": """
            lengths = mask.sum(1).tolist()
            read = [p + row[: n - 1] for p, row, n in zip(prompts, ids.tolist(), lengths)]
            tokens = pad_right(read)
            cache = None if prefix is None else KVCache(model.config, prefix=prefix)
            states = model.hidden(tokens, cache)
            start = torch.tensor([len(p) - 1 for p in prompts])
            row, j = mask.nonzero(as_tuple=True)
            return states[row, start[row] + j]""",
        "token_weights": """
            scored = mask.float()
            scored[:, :skip] = 0
            if reduction == "token":
                return scored / scored.sum().clamp(min=1)
            per_row = scored.sum(1, keepdim=True)
            rows = (per_row > 0).sum()
            return scored / per_row.clamp(min=1) / rows.clamp(min=1)""",
    },
    "q3": {
        "KVCache.advance": """
            slots = torch.arange(T)[None]
            self.filling = self.length is None
            if self.filling:
                self.length = torch.zeros(B, dtype=torch.long)
                self.capacity = T + self.room
                held = T
            else:
                slots = slots + self.length[:, None]
                held = self.capacity
            self.length = self.length + T
            self.slots, self.bias = slots, None
            if self.prefix is not None or not self.filling:
                keys = torch.arange(held)
                hidden = keys[None, None] > slots[..., None]
                own = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))
                self.bias = F.pad(own, (self.offset, 0))[:, None].repeat(1, 1, self.group, 1)
            return slots""",
        "KVCache.attend": """
            if self.filling:
                self.keys[layer] = F.pad(k, (0, 0, 0, self.room))
                self.values[layer] = F.pad(v, (0, 0, 0, self.room))
            else:
                b = torch.arange(len(k))[:, None]
                self.keys[layer][b, :, self.slots] = k.transpose(1, 2)
                self.values[layer][b, :, self.slots] = v.transpose(1, 2)
                k, v = self.keys[layer], self.values[layer]""",
        "GPT.generate": """
            states = model.hidden(ids, cache)
            h = states[torch.arange(B), lengths - 1]
            cache.length = lengths
            running = torch.ones(B, dtype=torch.bool)
            tokens, mask = [], []
            while True:
                logits = model.head(h)
                token = sample(logits, temperature, top_k, top_p, generator)
                tokens.append(token * running)
                mask.append(running)
                running = running & ~torch.isin(token, eos_ids)
                if len(tokens) == max_new_tokens or not running.any():
                    return torch.stack(tokens, dim=1), torch.stack(mask, dim=1)
                h = model.hidden(tokens[-1][:, None], cache)[:, 0]""",
    },
    "q4": {
        "render": """
            system = [] if context is None else [SYSTEM, *encode(context)]
            return system + [USER, *encode(prompt), ASSISTANT]""",
        "dressed": """
            *earlier, last = as_turns("user", row["prompt"])
            if "{prompt}" in template:
                values = row | {"prompt": last["content"], "attempt": attempt}
                last = last | {"content": fill(template, values)}
            return [*earlier, last]""",
        "file_example": """
            own = row.get("context", context)
            system, turns = split_system(as_turns("system", own))
            text = "".join(system)
            if "{context}" in template:
                text = fill(template, {"context": text}).strip()
            before = as_turns("system", text or None) + turns
            for shot in shots:
                before = before + dressed(template, shot) + as_turns("assistant", expert(shot))
            said = expert(row)
            asked = dressed(template, row)
            return Example(kind, before or None, row["prompt"], row.get("answer", said), said, asked, row)""",
    },
    "q5": {
        "cosd_loss": """
            h_s = shared_states(student, rows.prompts, rows.ids, rows.mask)
            h_t = None
            if rows.scorer is not None:
                h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)
            if chunk:
                theirs = None if h_t is None else rows.scorer.model.head.weight
                given = h_s, student.head.weight, h_t, theirs, tokens, rows.objective, weights
                loss, _, h = chunked_objective(*given, chunk)
            else:
                student_logits = student.head(h_s)
                teacher_logits = None
                if h_t is not None:
                    teacher_logits = rows.scorer.model.head(h_t).detach()
                d = rows.objective(student_logits, teacher_logits, tokens)
                loss, h = (weights * d).sum(), entropy(student_logits)
            return loss, {"loss": loss.detach(), "entropy": (weights * h).sum()}""",
        "token_probabilities": """
            h_s = completion_states(student, rows.prompts, rows.ids, rows.mask)
            h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)
            q, p = student.head(h_s).softmax(-1), rows.scorer.model.head(h_t).softmax(-1)
            return q.gather(-1, tokens)[:, 0], p.gather(-1, tokens)[:, 0]""",
    },
}

KL = "ratio = torch.where(a > 0, log_a - log_b, 0.0)\n"
MIX = "log_m = torch.logaddexp(safe_p + math.log(beta), safe_q + math.log1p(-beta))\n"
PARTS_OF_JSD = "return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)"
START = "start = torch.tensor([len(p) - 1 for p in prompts])"
PICK = "return states[row, start[row] + j]"
SAMPLE = "token = sample(logits, temperature, top_k, top_p, generator)"
BEFORE = 'before = as_turns("system", text or None) + turns\n'
SHOT = 'before = before + dressed(template, shot) + as_turns("assistant", expert(shot))'
EXAMPLE = 'return Example(kind, before or None, row["prompt"], row.get("answer", said), said, asked, row)'
STUDENT = "h_s = shared_states(student, rows.prompts, rows.ids, rows.mask)\n"
TEACHER = "    h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)\nif chunk"
D = "d = rows.objective(student_logits, teacher_logits, tokens)\n"
LOSS = "loss, h = (weights * d).sum(), entropy(student_logits)\n"
LOG = 'return loss, {"loss": loss.detach(), "entropy": (weights * h).sum()}'
CHUNKS = "loss, _, h = chunked_objective(*given, chunk)"
GIVEN = "given = h_s, student.head.weight, h_t, theirs, tokens, rows.objective, weights\n"

WRONG = [  # (question, what is wrong, the parts that it must lose by their number in judge.PARTS, old, new)
    # ---------------------------------------------------------------------------------------------------------- q1
    ("q1", "forward KL in the wrong direction", "123456", "return kl(log_p, log_q)\n", "return kl(log_q, log_p)\n"),
    ("q1", "reverse KL in the wrong direction", "123456", "return kl(log_q, log_p)\n", "return kl(log_p, log_q)\n"),
    ("q1", "ratio of probabilities: underflow", "45", KL, "ratio = (a / log_b.exp()).log()\n"),
    ("q1", "an epsilon in place of care", "123456", KL, "ratio = ((a + 1e-8) / (log_b.exp() + 1e-8)).log()\n"),
    ("q1", "0 · −inf", "5", KL, "ratio = log_a - log_b\n"),
    ("q1", "the care comes after the product", "5", KL + "return (a * ratio).sum(-1)", "return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)"),
    ("q1", "mean over the vocabulary", "123456", "(a * ratio).sum(-1)", "(a * ratio).mean(-1)"),
    ("q1", "one number for the batch", "2346", "(a * ratio).sum(-1)", "(a * ratio).sum()"),
    ("q1", "F.kl_div read forwards", "123456", "return kl(log_p, log_q)\n", "return F.kl_div(log_p, log_q, log_target=True, reduction='none').sum(-1)\n"),
    ("q1", "gradient into the teacher", "123456", "teacher_logits.detach()", "teacher_logits"),
    ("q1", "bf16 stays bf16", "6", "student_logits.log_softmax(-1, dtype=at_least_fp32)", "student_logits.log_softmax(-1)"),
    ("q1", "float64 cut to fp32", "1236", "student_logits.log_softmax(-1, dtype=at_least_fp32)", "student_logits.log_softmax(-1, dtype=torch.float32)"),
    ("q1", "softmax over the wrong axis", "2346", "student_logits.log_softmax(-1,", "student_logits.log_softmax(0,"),
    ("q1", "JSD with beta reversed", "23", MIX, "log_m = torch.logaddexp(safe_q + math.log(beta), safe_p + math.log1p(-beta))\n"),
    ("q1", "JSD with its weights reversed", "23", PARTS_OF_JSD, "return (1 - beta) * kl(log_p, log_m) + beta * kl(log_q, log_m)"),
    ("q1", "JSD from the mixture", "123456", PARTS_OF_JSD, "return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)"),
    ("q1", "logits are mixed, not probabilities", "123456", MIX, "log_m = (beta * safe_p + (1 - beta) * safe_q).log_softmax(-1)\n"),
    ("q1", "log-ratios are clamped", "45", KL, "ratio = torch.where(a > 0, log_a - log_b, 0.0).clamp(-100, 100)\n"),
    ("q1", "the averaging side is a constant", "13456", "a = log_a.exp()", "a = log_a.exp().detach()"),
    ("q1", "bits in place of nats", "123456", "(a * ratio).sum(-1)", "(a * ratio).sum(-1) / math.log(2)"),
    ("q1", "JSD is always halves", "23", "neither = log_q", "beta = 0.5\nneither = log_q"),
    ("q1", "Jeffreys' divergence for Jensen-Shannon's", "123456", PARTS_OF_JSD, "return beta * kl(log_p, log_q) + (1 - beta) * kl(log_q, log_p)"),
    ("q1", "NaN is replaced afterwards", "5", KL, "ratio = torch.nan_to_num(log_a - log_b)\n"),
    ("q1", "a temperature of 2", "123456", "log_q = student_logits.log_softmax", "log_q = (student_logits / 2).log_softmax"),
    ("q1", "the 100 likeliest tokens only", "26", "a = log_a.exp()", "top = log_a.topk(min(100, log_a.shape[-1])).indices\nlog_a, log_b = log_a.gather(-1, top), log_b.gather(-1, top)\na = log_a.exp()"),
    ("q1", "logits are a matrix", "1235", "(a * ratio).sum(-1)", "(a * ratio).sum(1)"),
    ("q1", "the logits are changed in place", "12346", "log_q = student_logits", "teacher_logits.data.sub_(1)\nlog_q = student_logits"),
    ("q1", "no gradient from JSD's second half", "13456", PARTS_OF_JSD, "return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q.detach(), log_m.detach())"),
    # ---------------------------------------------------------------------------------------------------------- q2
    ("q2", "shifted by one: the state at the token", "123", START, "start = torch.tensor([min(len(p), tokens.shape[1] - n) for p, n in zip(prompts, lengths)])"),
    ("q2", "shifted by one the other way", "123", START, "start = torch.tensor([max(len(p) - 2, 0) for p in prompts])"),
    ("q2", "cut at the longest prompt", "123", START, "start = torch.tensor([min(max(map(len, prompts)) - 1, tokens.shape[1] - n) for n in lengths])"),
    ("q2", "EOS not scored", "123", "row, j = mask.nonzero", "row, j = mask[:, 1:].nonzero"),
    ("q2", "prompt scored", "123", PICK, "return torch.cat([s[: len(c)] for s, c in zip(states, read)])"),
    ("q2", "column by column", "123", "row, j = mask.nonzero", "j, row = mask.T.nonzero"),
    ("q2", "the prefix is forgotten", "3", "model.hidden(tokens, cache)", "model.hidden(tokens)"),
    ("q2", "no gradient", "13", PICK, "return states.detach()[row, start[row] + j]"),
    ("q2", "mean over padded tokens", "45", "scored / scored.sum().clamp(min=1)", "scored / scored.numel()"),
    ("q2", "sum for mean", "45", "scored / scored.sum().clamp(min=1)", "scored"),
    ("q2", "batchmean over sequences", "45", "scored / scored.sum().clamp(min=1)", "scored / len(scored)"),
    ("q2", "weights without a last token", "45", "scored[:, :skip] = 0", "scored[:, :skip] = 0\nscored = scored * F.pad(mask[:, 1:], (0, 1))"),
    ("q2", "emptied rows still count", "5", "rows = (per_row > 0).sum()", "rows = torch.tensor(len(per_row))"),
    ("q2", "nothing left is NaN", "5", "scored / scored.sum().clamp(min=1)", "scored / scored.sum()"),
    ("q2", "skip ignored", "5", "scored[:, :skip] = 0", "pass"),
    ("q2", "skip keeps what it should leave out", "45", "scored[:, :skip] = 0", "scored[:, skip:] = 0"),
    ("q2", "skip leaves out the last tokens", "5", "scored[:, :skip] = 0", "scored[:, len(scored[0]) - skip :] = 0"),
    ("q2", "the mask is overwritten", "5", "scored[:, :skip] = 0", "mask[:, :skip] = False\nscored = mask.float()"),
    ("q2", "sequence means are summed", "45", "per_row.clamp(min=1) / rows.clamp(min=1)", "per_row.clamp(min=1)"),
    ("q2", "one reduction for both", "45", 'if reduction == "token":', "if True:"),
    ("q2", "the other reduction for both", "45", 'if reduction == "token":', "if False:"),
    ("q2", "padding read in place of the prompt", "123", "p + row[: n - 1] for p, row, n", "row[: n - 1] + p for p, row, n"),
    ("q2", "padding on the left", "123", "tokens = pad_right(read)", "tokens = torch.tensor([[0] * (max(map(len, read)) - len(r)) + r for r in read])"),
    ("q2", "the first row's length for all", "123", START, "start = torch.tensor([len(prompts[0]) - 1] * len(prompts))"),
    ("q2", "rows in another order", "123", "lengths = mask.sum(1).tolist()", "prompts = sorted(prompts, key=len)\nlengths = mask.sum(1).tolist()"),
    ("q2", "weights in float64", "45", "scored = mask.float()", "scored = mask.double()"),
    ("q2", "a mask without gaps is taken for granted", "4", "scored = mask.float()", "scored = (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)).float()"),
    ("q2", "the padding's states come along", "123", PICK, "return states[:, -mask.shape[1] :].flatten(0, 1)[: len(row)]"),
    ("q2", "the prompts grow", "123", "lengths = mask.sum(1).tolist()", "lengths = mask.sum(1).tolist()\nfor p, row, n in zip(prompts, ids.tolist(), lengths):\n    p.extend(row[: n - 1])\n    del p[len(p) - n + 1 :]\n    p.append(p.pop() + 0)\nprompts[0].append(0)\nprompts = [p[:-1] if i == 0 else p for i, p in enumerate(prompts)]"),
    # ---------------------------------------------------------------------------------------------------------- q3
    ("q3", "a query does not see itself", "12345", "keys[None, None] > slots[..., None]", "keys[None, None] >= slots[..., None].clamp(min=1)"),
    ("q3", "a query sees the slot after its own", "1234", "keys[None, None] > slots[..., None]", "keys[None, None] > slots[..., None] + 1"),
    ("q3", "everything is visible", "1234", "keys[None, None] > slots[..., None]", "keys[None, None] > slots[..., None] + held"),
    ("q3", "the first row's slots for all", "234", "slots = slots + self.length[:, None]", "slots = slots + self.length[:1, None]"),
    ("q3", "written one slot too early", "12345", "self.values[layer][b, :, self.slots] = v", "self.values[layer][b, :, (self.slots - 1).clamp(min=0)] = v"),
    ("q3", "values are not stored", "12345", "self.values[layer][b, :, self.slots] = v.transpose(1, 2)\n", "pass\n"),
    ("q3", "the prefix is not attended to", "14", "F.pad(own, (self.offset, 0))", "F.pad(own, (self.offset, 0), value=float('-inf'))"),
    ("q3", "cache positions off by one under padding", "2345", "cache.length = lengths\n", "cache.length = (lengths - 1).clamp(min=0)\n"),
    ("q3", "the padding counts as read", "234", "cache.length = lengths\n", "pass\n"),
    ("q3", "the first token is predicted from the padding", "234", "h = states[torch.arange(B), lengths - 1]", "h = states[:, -1]"),
    ("q3", "EOS left out of the mask", "3", "mask.append(running)\n    running = running & ~torch.isin(token, eos_ids)\n", "running = running & ~torch.isin(token, eos_ids)\n    mask.append(running)\n"),
    ("q3", "EOS left out of the mask where it is the last token allowed", "3", "mask.append(running)\n", "last = len(tokens) == max_new_tokens\n    mask.append(running & ~torch.isin(token, eos_ids) if last else running)\n"),
    ("q3", "one end token of several", "3", "torch.isin(token, eos_ids)", "torch.isin(token, eos_ids[:1])"),
    ("q3", "rows go on after EOS", "3", "running = running & ~torch.isin(token, eos_ids)", "running = ~torch.isin(token, eos_ids)"),
    ("q3", "the first row to end stops all", "3", "or not running.any()", "or not running.all()"),
    ("q3", "the batch never stops early", "3", " or not running.any()", ""),
    ("q3", "one token too few", "2345", "len(tokens) == max_new_tokens or", "len(tokens) == max(max_new_tokens - 1, 1) or"),
    ("q3", "one token too many", "2345", "len(tokens) == max_new_tokens or", "len(tokens) == max_new_tokens + 1 or"),
    ("q3", "ended rows are not filled with 0", "3", "tokens.append(token * running)", "tokens.append(token)"),
    ("q3", "ended rows are filled with the end token", "3", "tokens.append(token * running)", "tokens.append(torch.where(running, token, eos_ids[:1] if len(eos_ids) else 0))"),
    ("q3", "a mask of numbers", "234", "torch.stack(mask, dim=1)", "torch.stack(mask, dim=1).long()"),
    ("q3", "greedy rollouts", "5", SAMPLE, "token = sample(logits, 0, top_k, top_p, generator)"),
    ("q3", "temperature left out", "5", SAMPLE, "token = sample(logits, float(temperature > 0), top_k, top_p, generator)"),
    ("q3", "temperature twice", "5", SAMPLE, "token = sample(logits / (temperature or 1), temperature, top_k, top_p, generator)"),
    ("q3", "greedy below a temperature of a half", "5", SAMPLE, "token = sample(logits, temperature if temperature >= 0.5 else 0, top_k, top_p, generator)"),
    ("q3", "a temperature of at least one", "5", SAMPLE, "token = sample(logits, max(temperature, 1.0) if temperature else 0, top_k, top_p, generator)"),
    ("q3", "divided by the temperature in half precision", "5", SAMPLE, "token = sample(logits / (temperature or 1), float(temperature > 0), top_k, top_p, generator)"),
    ("q3", "top-k left out", "5", SAMPLE, "token = sample(logits, temperature, None, top_p, generator)"),
    ("q3", "top-k is one more", "5", SAMPLE, "token = sample(logits, temperature, top_k and top_k + 1, top_p, generator)"),
    ("q3", "top-p left out", "5", SAMPLE, "token = sample(logits, temperature, top_k, None, generator)"),
    ("q3", "the generator is ignored", "5", SAMPLE, "token = sample(logits, temperature, top_k, top_p, None)"),
    ("q3", "the generator is ignored at a temperature of one", "5", SAMPLE, "token = sample(logits, temperature, top_k, top_p, None if temperature == 1 else generator)"),
    ("q3", "a generator of one's own", "5", SAMPLE, "token = sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(len(tokens)))"),
    ("q3", "the same random numbers for every token", "5", SAMPLE, "token = sample(logits, temperature, top_k, top_p, generator and generator.clone_state())"),
    ("q3", "softmax and multinomial by hand, without top-k and top-p", "5", SAMPLE, "token = logits.argmax(-1) if temperature == 0 else torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]"),
    ("q3", "keys and values are confused", "12345", "self.keys[layer] = F.pad(k,", "self.keys[layer] = F.pad(v,"),
    ("q3", "only the latest call's keys are kept", "12345", "k, v = self.keys[layer], self.values[layer]", "pass"),
    ("q3", "every call fills the cache", "12345", "self.filling = self.length is None", "self.filling = True"),
    ("q3", "what is kept has no gradient", "1", "self.keys[layer] = F.pad(k,", "self.keys[layer] = F.pad(k.detach(),"),
    ("q3", "the whole row is read anew for every token", "234", "h = model.hidden(tokens[-1][:, None], cache)[:, 0]", "whole = [list(p) + [t[b].item() for t in tokens] for b, p in enumerate(prompts)]\n    cache = KVCache(model.config, prefix=prefix)\n    h = model.hidden(pad_right(whole), cache)[torch.arange(B), lengths + len(tokens) - 1]"),
    # ---------------------------------------------------------------------------------------------------------- q4
    ("q4", "the context in the student's prompt", "123", "system = [] if context is None else [SYSTEM, *encode(context)]", 'system = [SYSTEM, *encode(context or "style plain")]'),
    ("q4", "an empty context is taken for none", "2", "[] if context is None else", "[] if not context else"),
    ("q4", "the teacher's prompt truncated", "3", "else [SYSTEM, *encode(context)]", "else [SYSTEM, *encode(context)[:48]]"),
    ("q4", "the teacher's prompt truncated from the left", "3", "return system + [USER, *encode(prompt), ASSISTANT]", "return (system + [USER, *encode(prompt), ASSISTANT])[-64:]"),
    ("q4", "the student's prompt truncated", "3", "[USER, *encode(prompt), ASSISTANT]", "[USER, *encode(prompt)[:200], ASSISTANT]"),
    ("q4", "no assistant header for the teacher", "23", "[USER, *encode(prompt), ASSISTANT]", "[USER, *encode(prompt)] + [ASSISTANT] * (context is None)"),
    ("q4", "the context after the prompt", "23", "return system + [USER, *encode(prompt), ASSISTANT]", "return [USER, *encode(prompt), *system, ASSISTANT]"),
    ("q4", "the context inside the user's turn", "23", "return system + [USER, *encode(prompt), ASSISTANT]", "return [USER, *encode((context + ' ' if context else '') + prompt), ASSISTANT]"),
    ("q4", "markers in a text become markers", "3", "*encode(prompt), ASSISTANT", "*ENCODING.encode(prompt, allowed_special='all'), ASSISTANT"),
    ("q4", "texts are stripped", "2", "*encode(prompt), ASSISTANT", "*encode(prompt.strip()), ASSISTANT"),
    ("q4", "the prompt is not dressed", "46", "asked = dressed(template, row)", 'asked = as_turns("user", row["prompt"])'),
    ("q4", "shots are not dressed", "46", "dressed(template, shot)", 'as_turns("user", shot["prompt"])'),
    ("q4", "shots are dressed with the prompt's own solution", "6", "dressed(template, shot)", 'dressed(template, row | {"prompt": shot["prompt"]})'),
    ("q4", "the expert's demonstration is not shown", "46", 'as_turns("assistant", expert(shot))', 'as_turns("assistant", shot["answer"])'),
    ("q4", "the answer is shown before the solution", "6", 'as_turns("assistant", expert(shot))', 'as_turns("assistant", shot.get("answer") if "solution" in shot else expert(shot))'),
    ("q4", "the prompt before its context", "456", BEFORE, 'before = dressed(template, row) + as_turns("system", text or None) + turns\n'),
    ("q4", "example turns dropped", "45", BEFORE, 'before = as_turns("system", text or None)\n'),
    ("q4", "the context's turns after the shots", "45", BEFORE + "for shot in shots:\n    " + SHOT, 'before = as_turns("system", text or None)\nfor shot in shots:\n    ' + SHOT + "\nbefore = before + turns"),
    ("q4", "earlier turns of the prompt dropped", "56", "return [*earlier, last]", "return [last]"),
    ("q4", "shots without their answers", "456", SHOT, "before = before + dressed(template, shot)"),
    ("q4", "shots without their prompts", "456", SHOT, 'before = before + as_turns("assistant", expert(shot))'),
    ("q4", "shots before the example turns", "45", SHOT, 'before = dressed(template, shot) + as_turns("assistant", expert(shot)) + before'),
    ("q4", "one shot only", "4", "for shot in shots:", "for shot in shots[:1]:"),
    ("q4", "the system turn after the example turns", "45", BEFORE, 'before = turns + as_turns("system", text or None)\n'),
    ("q4", "an empty system turn", "456", BEFORE, 'before = as_turns("system", text) + turns\n'),
    ("q4", "no context is an empty list", "456", "before or None", "before"),
    ("q4", "every turn of the prompt is dressed", "6", "return [*earlier, last]", "if '{prompt}' in template:\n    earlier = [t | {'content': fill(template, values | {'prompt': t['content']})} for t in earlier]\nreturn [*earlier, last]"),
    ("q4", "the example turns are dressed, too", "5", BEFORE, "if '{prompt}' in template or True:\n    turns = [t | {'content': fill(template or '{prompt}', row | {'prompt': t['content'], 'context': t['content']})} if t['role'] == 'user' else t for t in turns]\n" + BEFORE),
    ("q4", "the first turn is dressed", "56", '*earlier, last = as_turns("user", row["prompt"])', 'last, *earlier = as_turns("user", row["prompt"])'),
    ("q4", "a line's own context is not shown", "5", 'own = row.get("context", context)', "own = context"),
    ("q4", "a line's own context is shown beside the other", "5", 'own = row.get("context", context)', 'own = as_turns("system", context) + as_turns("system", row.get("context"))'),
    ("q4", "the system turn is not dressed", "5", 'text = fill(template, {"context": text}).strip()', "pass"),
    ("q4", "the template's own words need a system turn", "5", 'if "{context}" in template:', 'if "{context}" in template and text:'),
    ("q4", "braces in a text are filled, too", "46", 'last = last | {"content": fill(template, values)}', 'last = last | {"content": fill(fill(template, values), values)}'),
    ("q4", "the student's attempt is left out", "6", '"attempt": attempt}', '"attempt": ""}'),
    ("q4", "the prompt is changed in place", "6", 'last = last | {"content": fill(template, values)}', 'last["content"] = fill(template, values)'),
    ("q4", "the expert is imitated and graded alike", "46", 'row.get("answer", said), said', "said, said"),
    ("q4", "the answer is imitated and graded alike", "46", 'row.get("answer", said), said', 'row.get("answer", said), row.get("answer", said)'),
    ("q4", "the student reads the teacher's prompt", "456", 'before or None, row["prompt"]', "before or None, asked"),
    ("q4", "the line is not kept", "456", "said, asked, row)", "said, asked)"),
    # ---------------------------------------------------------------------------------------------------------- q5
    ("q5", "teacher not detached", "12345", "rows.scorer.model.head(h_t).detach()", "rows.scorer.model.head(h_t)"),
    ("q5", "the student's head for the teacher", "12345", "rows.scorer.model.head(h_t).detach()", "student.head(h_t).detach()"),
    ("q5", "the teacher does not see the context", "12345", TEACHER, TEACHER.replace("scorer_prompts", "prompts")),
    ("q5", "the context in the student's prompt", "12345", STUDENT, STUDENT.replace("rows.prompts", "rows.scorer_prompts")),
    ("q5", "no gradient to the student", "12345", STUDENT, STUDENT.replace("\n", ".detach().requires_grad_()\n")),
    ("q5", "the student is its own teacher", "12345", TEACHER, TEACHER.replace("rows.scorer.states", "Teacher(student, 'live').states")),
    ("q5", "the teacher's model is asked in place of the teacher", "1", TEACHER, TEACHER.replace("h_t = rows", "with torch.no_grad(): h_t = rows").replace("rows.scorer.states(", "completion_states(rows.scorer.model, ")),
    ("q5", "the student's own weights are asked, with its adapters", "1", TEACHER, TEACHER.replace("h_t = rows", "with torch.no_grad(): h_t = rows").replace("rows.scorer.states(", "completion_states(student if student.adapted else rows.scorer.model, ")),
    ("q5", "mean in place of the weights", "12345", LOSS, "loss, h = d.mean(), entropy(student_logits)\n"),
    ("q5", "mean over the tokens, whatever `sequence` and `skip` say", "12345", LOSS, "loss, h = d.sum() / rows.mask.sum(), entropy(student_logits)\n"),
    ("q5", "sum in place of the weights", "12345", LOSS, "loss, h = d.sum(), entropy(student_logits)\n"),
    ("q5", "mean of the weighted values", "12345", LOSS, "loss, h = (weights * d).mean(), entropy(student_logits)\n"),
    ("q5", "weights made to sum to one for every part", "45", LOSS, "loss, h = (weights * d).sum() / weights.sum(), entropy(student_logits)\n"),
    ("q5", "divided by the number of rows", "12345", LOSS, "loss, h = (weights * d).sum() / len(rows.prompts), entropy(student_logits)\n"),
    ("q5", "the loss has no graph", "12345", LOSS, "loss, h = (weights * d).sum().detach(), entropy(student_logits)\n"),
    ("q5", "a temperature squared before the loss", "12345", LOSS, "d = d * 2.0**2\n    " + LOSS),
    ("q5", "values below zero are cut off", "2", LOSS, "d = d.clamp(min=0)\n    " + LOSS),
    ("q5", "teacher and student change places", "12345", D, "d = rows.objective(teacher_logits, student_logits, tokens)\n"),
    ("q5", "always the squared distance", "1245", D, "d = ((student_logits - 2 * teacher_logits) ** 2).sum(-1)\n"),
    ("q5", "the next token in place of the token", "24", D, "d = rows.objective(student_logits, teacher_logits, tokens.roll(-1))\n"),
    ("q5", "temperature in the student's logits", "12345", D, "d = rows.objective(student_logits / 2, teacher_logits, tokens)\n"),
    ("q5", "logits rounded to half precision", "12345", D, "d = rows.objective(student_logits.bfloat16().to(student_logits), teacher_logits, tokens)\n"),
    ("q5", "chunks lose the weights", "12345", GIVEN, GIVEN.replace("weights\n", "weights * 0 + 1\n")),
    ("q5", "chunks of another objective", "12345", GIVEN, GIVEN.replace("rows.objective", "cross_entropy")),
    ("q5", "chunks leave the student's head out", "12345", GIVEN, GIVEN.replace("student.head.weight", "student.head.weight.detach()")),
    ("q5", "chunks leave the student's states out", "12345", GIVEN, GIVEN.replace("h_s,", "h_s.detach().requires_grad_(),")),
    ("q5", "chunk ignored", "1", "if chunk:", "if False:"),
    ("q5", "chunks of the default size", "1", CHUNKS, "loss, _, h = chunked_objective(*given)"),
    ("q5", "the last, shorter chunk is dropped", "12345", CHUNKS, "n = len(tokens) // chunk * chunk or len(tokens)\n    loss, _, h = chunked_objective(h_s[:n], student.head.weight, h_t if h_t is None else h_t[:n], theirs, tokens[:n], rows.objective, weights[:n], chunk)\n    h = torch.cat([h, h.new_zeros(len(tokens) - n)])"),
    ("q5", "a teacher always", "124", "if rows.scorer is not None:", "if True:"),
    ("q5", "nothing is learned without a teacher", "124", STUDENT, STUDENT + "if rows.scorer is None:\n    return (0 * h_s).sum(), {}\n"),
    ("q5", "the log keeps the graph", "12345", LOG, LOG.replace("loss.detach()", "loss")),
    ("q5", "the mean entropy is logged, whatever the weights", "12345", LOG, LOG.replace("(weights * h).sum()", "h.mean()")),
    ("q5", "the teacher's entropy is logged", "12345", LOSS, LOSS.replace("entropy(student_logits)", "entropy(teacher_logits if h_t is not None else student_logits)")),
    ("q5", "backward is called here", "12345", LOG, "loss.backward(retain_graph=True)\n" + LOG),
    ("q5", "the weights are changed in place", "12345", LOG, "rows.weights.div_(2)\n" + LOG),
    ("q5", "the likeliest token's probability", "6", "q.gather(-1, tokens)[:, 0], p.gather(-1, tokens)[:, 0]", "q.amax(-1), p.amax(-1)"),
    ("q5", "student and scorer change places", "6", "return q.gather(-1, tokens)[:, 0], p.gather(-1, tokens)[:, 0]", "return p.gather(-1, tokens)[:, 0], q.gather(-1, tokens)[:, 0]"),
    ("q5", "log-probabilities for probabilities", "6", "return q.gather(-1, tokens)[:, 0], p", "return q.gather(-1, tokens)[:, 0].log(), p"),
    ("q5", "the scorer's probabilities without its context", "6", "h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)\nq, p", "h_t = rows.scorer.states(rows.prompts, rows.ids, rows.mask)\nq, p"),
]

RIGHT = [  # (question, what is different, bodies, what stands beside them)
    ("q1", "F.kl_div, whose arguments read backwards", {"forward_kl": """
        never = log_p.isneginf()
        p = log_p.masked_fill(never, -1e30)
        return F.kl_div(log_q.masked_fill(never, 0), p, reduction="none", log_target=True).sum(-1)"""}, ""),
    ("q1", "einsum", {"kl": """
        a, zero = log_a.exp(), torch.zeros(())
        return torch.einsum("...v,...v->...", a, torch.where(a > 0, log_a - log_b, zero.to(a)))"""}, ""),
    ("q1", "cross-entropy less entropy", {"kl": """
        a = torch.exp(log_a)
        crossed, own = (-(a * x.masked_fill(a == 0, 0)).sum(-1) for x in (log_b, log_a))
        return crossed - own"""}, ""),
    ("q1", "logsumexp by hand, no_grad for the teacher", {"log_softmax_pair": """
        student_logits = student_logits.to(at_least_fp32)
        with torch.no_grad():
            logits = teacher_logits.to(at_least_fp32)
            log_p = logits - logits.logsumexp(-1, keepdim=True)
        return student_logits - student_logits.logsumexp(-1, keepdim=True), log_p"""}, ""),
    ("q1", "logsumexp of a stack, in a helper with a constant and an import of its own", {"jsd": """
        return (1 - beta) * kl(log_q, mixed(log_p, log_q, beta)) + beta * kl(log_p, mixed(log_p, log_q, beta))"""}, """
        from math import log as LN

        TINY = -1e30

        def mixed(log_p, log_q, beta):
            a, b = log_p.clamp(min=TINY), log_q.clamp(min=TINY)
            return torch.stack([a + LN(beta), b + LN(1 - beta)]).logsumexp(0)"""),
    ("q1", "the mixture is a constant: its gradient cancels", {"jsd": """
        m = torch.logaddexp(log_p.clamp(min=-1e30) + math.log(beta), log_q.detach().clamp(min=-1e30) + math.log1p(-beta))
        return beta * kl(log_p, m) + (1 - beta) * kl(log_q, m)"""}, ""),
    ("q2", "row by row", {"completion_states": """
        rows = []
        for prompt, tokens, here in zip(prompts, ids, mask):
            whole = torch.tensor([[*prompt, *tokens[here][:-1].tolist()]])
            cache = None if prefix is None else KVCache(model.config, prefix=prefix)
            rows.append(model.hidden(whole, cache)[0, len(prompt) - 1 :])
        return torch.cat(rows)"""}, ""),
    ("q2", "the last token is read too, a mask over all positions", {"completion_states": """
        n = mask.sum(1)
        tokens = pad_right([list(p) + y[m].tolist() for p, y, m in zip(prompts, ids, mask)])
        first = torch.tensor([[len(p) - 1] for p in prompts])
        cache = KVCache(model.config, prefix=prefix) if prefix else None
        t = torch.arange(tokens.shape[1])
        return model.hidden(tokens, cache)[(t >= first) & (t < first + n[:, None])]"""}, ""),
    ("q2", "gather", {"completion_states": """
        whole = pad_right([p + row for p, row in zip(prompts, ids.tolist())])
        h = model.hidden(whole, KVCache(model.config, prefix=prefix) if prefix else None)
        at = torch.tensor([[len(p) - 1] for p in prompts]) + torch.arange(ids.shape[1])
        return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))[mask]"""}, ""),
    ("q2", "a loop over rows", {"token_weights": """
        scored = mask.float() * (torch.arange(mask.shape[1]) >= skip)
        if reduction == "token":
            return scored / max(scored.sum().item(), 1)
        rows = [row / row.sum() if row.any() else row for row in scored]
        return torch.stack(rows) / max(1, sum(bool(row.any()) for row in scored))"""}, ""),
    ("q3", "lists in place of slots, the mask by comparison of two ranges", {"KVCache.advance": """
        self.filling = self.length is None
        if self.filling:
            self.length, self.capacity = torch.zeros(B, dtype=torch.long), T + self.room
        first = self.length.tolist()
        slots = torch.stack([torch.arange(n, n + T) for n in (first[:1] if self.filling else first)])
        self.length = self.length + T
        self.slots = slots
        S = T if self.filling else self.capacity
        seen = torch.arange(S) <= slots[..., None]
        seen = torch.cat([torch.ones(*seen.shape[:2], self.offset, dtype=torch.bool), seen], -1)
        plain = self.filling and not self.prefix
        zero = torch.zeros((), dtype=dtype)
        self.bias = None if plain else torch.where(seen, zero, -torch.inf).to(dtype).repeat(1, self.group, 1)[:, None]
        return slots"""}, ""),
    ("q3", "scatter", {"KVCache.attend": """
        if self.filling:
            empty = k.new_zeros(*k.shape[:2], self.room, k.shape[3])
            self.keys[layer], self.values[layer] = (torch.cat([x, empty], 2) for x in (k, v))
        else:
            where = self.slots[:, None, :, None].expand(*k.shape)
            k = self.keys[layer] = self.keys[layer].scatter(2, where, k)
            v = self.values[layer] = self.values[layer].scatter(2, where, v)"""}, ""),
    ("q3", "a for loop, and what it calls", {"GPT.generate": """
        h = last_states(model.hidden(ids, cache), lengths)
        cache.length = cache.length - (L - lengths)
        out, seen = torch.zeros(B, max_new_tokens, dtype=torch.long), torch.zeros(B, max_new_tokens).bool()
        alive = torch.full((B,), True)
        for i in range(max_new_tokens):
            chosen = sample(model.head(h), temperature, top_k, top_p, generator)
            out[:, i], seen[:, i] = torch.where(alive, chosen, 0), alive
            alive = alive & ~(chosen[:, None] == eos_ids[None]).any(1)
            if not alive.any() or i + 1 == max_new_tokens:
                return out[:, : i + 1], seen[:, : i + 1]
            h = model.hidden(out[:, i : i + 1], cache)[:, 0]"""}, """
        def last_states(h, lengths):
            return torch.stack([row[n - 1] for row, n in zip(h, lengths.tolist())])"""),
    ("q4", "a list that grows", {"render": """
        ids = []
        if context is not None:
            ids.append(SYSTEM)
            ids.extend(encode(context))
        ids += [USER] + encode(prompt)
        ids.append(ASSISTANT)
        return ids"""}, ""),
    ("q4", "a copy whose last turn is replaced", {"dressed": """
        turns = [dict(turn) for turn in as_turns("user", row["prompt"])]
        if "{prompt}" in template:
            text = turns[-1]["content"]
            turns[-1]["content"] = fill(template, {**row, "prompt": text, "attempt": attempt})
        return turns"""}, ""),
    ("q4", "one list of turns, by a helper", {"file_example": """
        said = row["context"] if "context" in row else context
        system, turns = split_system(as_turns("system", said))
        words = "".join(system)
        if template.count("{context}"):
            words = fill(template, dict(context=words)).strip()
        shown = ([say("system", words)] if words else []) + turns
        for shot in shots:
            shown = [*shown, *dressed(template, shot), say("assistant", expert(shot))]
        wanted = row["answer"] if "answer" in row else expert(row)
        return Example(kind=kind, context=shown or None, prompt=row["prompt"], answer=wanted,
                       expert=expert(row), asked=dressed(template, row), row=row)"""}, """
        def say(role, content):
            return {"role": role, "content": content}"""),
    ("q5", "always by chunks, one as long as everything", {"cosd_loss": """
        h_t, head_t = None, None
        if rows.scorer is not None:
            h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)
            head_t = rows.scorer.model.head.weight
        h_s = completion_states(student, rows.prompts, rows.ids, rows.mask)
        given = h_s, student.head.weight, h_t, head_t, tokens, rows.objective, weights
        loss, _, entropies = chunked_objective(*given, chunk or len(tokens))
        return loss, {"loss": loss.detach(), "entropy": entropies @ weights.to(entropies)}"""}, ""),
    ("q5", "chunks by hand, the loss as an inner product", {"cosd_loss": """
        h_s, h_t = shared_states(student, rows.prompts, rows.ids, rows.mask), None
        if rows.scorer is not None:
            h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)
        values, entropies = [], []
        for i in range(0, len(weights), chunk or len(weights)):
            here = slice(i, i + (chunk or len(weights)))
            with torch.no_grad():
                theirs = None if h_t is None else rows.scorer.model.head(h_t[here])
            ours = student.head(h_s[here])
            values.append(rows.objective(ours, theirs, tokens[here]))
            entropies.append(entropy(ours))
        d, h = torch.cat(values), torch.cat(entropies)
        loss = torch.einsum("n,n->", weights.to(d.dtype), d)
        log = {"loss": loss, "entropy": (weights * h).sum()}
        return loss, {name: value.detach() for name, value in log.items()}"""}, ""),
    ("q5", "softmax, gathered by index", {"token_probabilities": """
        sides = (student, completion_states(student, rows.prompts, rows.ids, rows.mask)), (
            rows.scorer.model, rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask))
        n = torch.arange(len(tokens))
        return tuple(torch.softmax(m.head(h), -1)[n, tokens.flatten()] for m, h in sides)"""}, ""),
]

# Each is the whole body of one function, and looks for the answer elsewhere, or tries to be taken for one.
# It may use `here`, the function's name, and `given`, its arguments.
CHEATS = {
    "the grader's file, by the command line": """
        return loaded(sys.argv[0])""",
    "the grader's file, by /proc": """
        for process in os.listdir("/proc"):
            if process.isdigit():
                for word in open(f"/proc/{process}/cmdline").read().split(chr(0)):
                    if word.endswith(".py"):
                        return loaded(word)
        raise LookupError""",
    "the working folder of the process that started this one": """
        return loaded(os.readlink(f"/proc/{os.getppid()}/cwd") + "/notebooks/homework.py")""",
    "the project's folder, which it knows": """
        return loaded(ROOT + "/x")""",
    "the project's file, read by a program": """
        import subprocess
        said = subprocess.run(["cat", f"{ROOT}/{MODULE}.py"], capture_output=True, check=True)
        return read(said.stdout.decode())""",
    "a walk through all folders": """
        for folder, _, names in os.walk(os.path.dirname(ROOT)):
            if MODULE + ".py" in names and "train.py" in names:
                return loaded(folder + "/x")
        raise LookupError""",
    "the place where the project is installed": """
        for path in sys.path:
            for name in os.listdir(path):
                if "cosd" in name:
                    return loaded(open(os.path.join(path, name)).read().split("'")[1])
        raise LookupError""",
    "the project by its name": """
        import importlib
        sys.modules.pop(MODULE)
        return getattr(importlib.import_module(MODULE), here)(*given)""",
    "a folder by an environment variable": """
        return loaded(os.environ["PWD"] + "/" + os.environ["OLDPWD"])""",
    "frames up to whoever knows what is wanted": """
        frame = sys._getframe()
        while frame:
            for name, value in frame.f_locals.items():
                if name in ("want", "expected", "token", "tests", "results", "judge"):
                    return value
            frame = frame.f_back
        raise LookupError""",
    "the garbage collector's list of functions": """
        import gc
        for value in gc.get_objects():
            if callable(value) and getattr(value, "__name__", "") == here and value.__code__.co_code != CODE:
                return value(*given)
        raise LookupError""",
    "the tests' own definitions": """
        for module in list(sys.modules.values()):
            for name, value in vars(module).copy().items():
                if name.startswith("plain_") and callable(value) and name != "plain":
                    return value(*given)
        raise LookupError""",
    "the stand-ins of other questions": """
        main = sys.modules["__main__"]
        return next(f for f in main.STANDINS.values() if f.__name__ in ("plain_states", "standin_states"))(*given)""",
    "comparisons that always agree": """
        import torch.testing
        torch.testing.assert_close = lambda *a, **k: None
        torch.equal = torch.allclose = lambda *a, **k: True
        return torch.zeros(3)""",
    "a tensor that equals everything": """
        class Same(torch.Tensor):
            def __eq__(self, other): return torch.ones(1).bool()
            def allclose(self, *a, **k): return True
            @classmethod
            def __torch_function__(cls, f, types, args=(), kwargs=None): return torch.tensor(True)
        return torch.zeros(3).as_subclass(Same)""",
    "an object that equals everything": """
        class Same:
            def __eq__(self, other): return True
            def __getattr__(self, name): return self
            def __call__(self, *a, **k): return self
            def __iter__(self): return iter([self])
        return Same()""",
    "an output written by hand": """
        line = (json.dumps({"out": {}, "ended": None, "score": 15, "passed": True}) + chr(10)).encode()
        for descriptor in range(64):
            try:
                os.write(descriptor, line * 100)
            except OSError:
                pass
        os._exit(0)""",
    "patched functions around it": """
        main = sys.modules["__main__"]
        main.plain = lambda value: {"passed": True}
        main.json.dumps = lambda value: '{"out": {"value": true}}'
        raise LookupError""",
    "pytest's own outcome": """
        import pytest
        pytest.skip("later")""",
    "an exit that looks like success": """
        os._exit(0)""",
    "sys.exit": """
        sys.exit(0)""",
    "an endless loop": """
        while True: pass""",
    "an endless sleep": """
        import time
        time.sleep(10**6)""",
    "all of the memory": """
        held = []
        while True: held.append(bytearray(2**28))""",
    "a flood of words": """
        while True: print("x" * 10**7)""",
    "a flood of output": """
        return torch.zeros(3 * 10**7)""",
    "a file of one's own": """
        open("/tmp/left behind", "w").write(open("/tmp/left behind").read())
        return loaded("/tmp/left behind")""",
    "a child that outlives it": """
        if os.fork() == 0:
            os.setsid()
            while True: pass
        raise LookupError""",
    "the grader's end": """
        import signal
        os.kill(os.getppid(), signal.SIGKILL)
        raise LookupError""",
    "the parent's memory": """
        memory = open(f"/proc/{os.getppid()}/mem", "rb")
        return memory.read(100)""",
    "C's way to open a file": """
        import ctypes
        libc = ctypes.CDLL(None)
        descriptor = libc.open(f"{ROOT}/{MODULE}.py".encode(), 0)
        return read(os.read(descriptor, 10**6).decode())""",
    "PyTorch's way to open a file": """
        path = f"{ROOT}/{MODULE}.py"
        size = os.stat(path).st_size
        return read(bytes(torch.from_file(path, size=size, dtype=torch.uint8).tolist()).decode())""",
    "a descriptor below the limit": """
        import resource
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        return loaded(ROOT + "/x")""",
    "a way out of the empty folder": """
        os.mkdir("out")
        os.chroot("out")
        for _ in range(20):
            os.chdir("..")
        os.chroot(".")
        return loaded(ROOT + "/x")""",
    "a file that is open already": """
        for descriptor in range(3, 64):
            try:
                text = os.pread(descriptor, 10**6, 0).decode()
            except OSError:
                continue
            if "def " in text:
                return read(text)
        raise LookupError""",
    "another program": """
        import subprocess
        return subprocess.run(["cat", "/proc/1/cmdline"], capture_output=True, check=True).stdout""",
    "the network": """
        import socket
        socket.create_connection(("192.0.2.1", 80), timeout=1)
        return torch.zeros(3)""",
    "a descriptor that is closed to make room": """
        for descriptor in (0, 1, 2):
            os.close(descriptor)
        return loaded(os.listdir("/")[0])""",
    "a pickle in place of numbers": """
        class Evil:
            def __reduce__(self): return (os.system, ("touch /tmp/pwned",))
        return Evil()""",
    "a number that is no number": """
        return torch.full((3,), float("nan"))""",
    "a nested answer without end": """
        value = []
        for _ in range(10**5): value = [value]
        return value""",
}
CHEATING = """
import importlib.util, json, os, sys
MODULE, ROOT = {module!r}, {root!r}

def read(text):
    names = {{"__name__": "stolen"}}
    exec(text, names)
    return names[here](*given)

def loaded(path):
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(os.path.join(folder, MODULE + ".py")):
        assert folder != os.path.dirname(folder)
        folder = os.path.dirname(folder)
    spec = importlib.util.spec_from_file_location("stolen", os.path.join(folder, MODULE + ".py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, here)(*given)
"""
# fmt: on


def bodies(question: str, changes: dict[str, str] | None = None) -> dict[str, str]:
    return {
        name: textwrap.dedent(body).strip("\n") + "\n"
        for name, body in (MODEL[question] | (changes or {})).items()
    }


def file_with(question: str, texts: dict[str, str], beside: str = "") -> str:
    """The file of a question with these bodies in its blanks, and new top-level names before the first of them."""
    (name,) = homework.QUESTIONS[question].files
    source = (homework.ROOT / name).read_text()
    lines = source.splitlines()
    blanks = [b for b in homework.blanks(name, source) if b.asked.question == question]
    for blank in reversed(blanks):
        text = textwrap.indent(texts[blank.asked.function].rstrip("\n"), blank.indent)
        lines[blank.first - 1 : blank.last] = text.splitlines()
    if beside:
        tree = ast.parse(source)
        first = min(
            node.lineno
            for node in tree.body
            if getattr(node, "name", "") in {b.asked.function.partition(".")[0] for b in blanks}
        )
        above = len(lines) if first is None else first - 1
        while above and lines[above - 1].startswith(("@", "#")):
            above -= 1
        lines[above:above] = [*textwrap.dedent(beside).strip("\n").splitlines(), "", ""]
    return "\n".join(lines) + "\n"


def changed(question: str, old: str, new: str) -> str:
    """The model answer with one text replaced, which must be there once."""
    texts = bodies(question)
    places = [name for name, text in texts.items() if old in text]
    assert sum(text.count(old) for text in texts.values()) == 1, f"{question}: {old!r} in {places}"
    (name,) = places
    return file_with(question, texts | {name: texts[name].replace(old, new)})
