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

WRONG = [  # (question, what is wrong, old, new)
    # ---------------------------------------------------------------------------------------------------------- q1
    ("q1", "forward KL in the wrong direction", "return kl(log_p, log_q)\n", "return kl(log_q, log_p)\n"),
    ("q1", "reverse KL in the wrong direction", "return kl(log_q, log_p)\n", "return kl(log_p, log_q)\n"),
    ("q1", "ratio of probabilities: underflow", KL, "ratio = (a / log_b.exp()).log()\n"),
    ("q1", "an epsilon in place of care", KL, "ratio = ((a + 1e-8) / (log_b.exp() + 1e-8)).log()\n"),
    ("q1", "0 · −inf", KL, "ratio = log_a - log_b\n"),
    ("q1", "the care comes after the product", KL + "return (a * ratio).sum(-1)", "return torch.where(a > 0, a * (log_a - log_b), 0.0).sum(-1)"),
    ("q1", "mean over the vocabulary", "(a * ratio).sum(-1)", "(a * ratio).mean(-1)"),
    ("q1", "one number for the batch", "(a * ratio).sum(-1)", "(a * ratio).sum()"),
    ("q1", "F.kl_div read forwards", "return kl(log_p, log_q)\n", "return F.kl_div(log_p, log_q, log_target=True, reduction='none').sum(-1)\n"),
    ("q1", "gradient into the teacher", "teacher_logits.detach()", "teacher_logits"),
    ("q1", "bf16 stays bf16", "student_logits.log_softmax(-1, dtype=at_least_fp32)", "student_logits.log_softmax(-1)"),
    ("q1", "float64 cut to fp32", "student_logits.log_softmax(-1, dtype=at_least_fp32)", "student_logits.log_softmax(-1, dtype=torch.float32)"),
    ("q1", "softmax over the wrong axis", "student_logits.log_softmax(-1,", "student_logits.log_softmax(0,"),
    ("q1", "JSD with beta reversed", MIX, "log_m = torch.logaddexp(safe_q + math.log(beta), safe_p + math.log1p(-beta))\n"),
    ("q1", "JSD with its weights reversed", PARTS_OF_JSD, "return (1 - beta) * kl(log_p, log_m) + beta * kl(log_q, log_m)"),
    ("q1", "JSD from the mixture", PARTS_OF_JSD, "return beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)"),
    ("q1", "logits are mixed, not probabilities", MIX, "log_m = (beta * safe_p + (1 - beta) * safe_q).log_softmax(-1)\n"),
    ("q1", "the mixture is taken for a constant", MIX, MIX.replace("\n", ".detach() + 0 * safe_q\n")),
    ("q1", "log-ratios are clamped", KL, "ratio = torch.where(a > 0, log_a - log_b, 0.0).clamp(-100, 100)\n"),
    ("q1", "the averaging side is a constant", "a = log_a.exp()", "a = log_a.exp().detach()"),
    ("q1", "bits in place of nats", "(a * ratio).sum(-1)", "(a * ratio).sum(-1) / math.log(2)"),
    ("q1", "JSD is always halves", "neither = log_q", "beta = 0.5\nneither = log_q"),
    ("q1", "Jeffreys' divergence for Jensen-Shannon's", PARTS_OF_JSD, "return beta * kl(log_p, log_q) + (1 - beta) * kl(log_q, log_p)"),
    ("q1", "NaN is replaced afterwards", KL, "ratio = torch.nan_to_num(log_a - log_b)\n"),
    ("q1", "a temperature of 2", "log_q = student_logits.log_softmax", "log_q = (student_logits / 2).log_softmax"),
    ("q1", "the 100 likeliest tokens only", "a = log_a.exp()", "top = log_a.topk(min(100, log_a.shape[-1])).indices\nlog_a, log_b = log_a.gather(-1, top), log_b.gather(-1, top)\na = log_a.exp()"),
    ("q1", "logits are a matrix", "(a * ratio).sum(-1)", "(a * ratio).sum(1)"),
    ("q1", "the logits are changed in place", "log_q = student_logits", "teacher_logits.data.sub_(1)\nlog_q = student_logits"),
    ("q1", "no gradient from JSD's second half", PARTS_OF_JSD, "return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q.detach(), log_m.detach())"),
    # ---------------------------------------------------------------------------------------------------------- q2
    ("q2", "shifted by one: the state at the token", START, "start = torch.tensor([min(len(p), tokens.shape[1] - n) for p, n in zip(prompts, lengths)])"),
    ("q2", "shifted by one the other way", START, "start = torch.tensor([max(len(p) - 2, 0) for p in prompts])"),
    ("q2", "cut at the longest prompt", START, "start = torch.tensor([min(max(map(len, prompts)) - 1, tokens.shape[1] - n) for n in lengths])"),
    ("q2", "EOS not scored", "row, j = mask.nonzero", "row, j = mask[:, 1:].nonzero"),
    ("q2", "prompt scored", PICK, "return torch.cat([s[: len(c)] for s, c in zip(states, read)])"),
    ("q2", "column by column", "row, j = mask.nonzero", "j, row = mask.T.nonzero"),
    ("q2", "the prefix is forgotten", "model.hidden(tokens, cache)", "model.hidden(tokens)"),
    ("q2", "no gradient", PICK, "return states.detach()[row, start[row] + j]"),
    ("q2", "mean over padded tokens", "scored / scored.sum().clamp(min=1)", "scored / scored.numel()"),
    ("q2", "sum for mean", "scored / scored.sum().clamp(min=1)", "scored"),
    ("q2", "batchmean over sequences", "scored / scored.sum().clamp(min=1)", "scored / len(scored)"),
    ("q2", "weights without a last token", "scored[:, :skip] = 0", "scored[:, :skip] = 0\nscored = scored * F.pad(mask[:, 1:], (0, 1))"),
    ("q2", "emptied rows still count", "rows = (per_row > 0).sum()", "rows = torch.tensor(len(per_row))"),
    ("q2", "nothing left is NaN", "scored / scored.sum().clamp(min=1)", "scored / scored.sum()"),
    ("q2", "skip ignored", "scored[:, :skip] = 0", "pass"),
    ("q2", "skip keeps what it should leave out", "scored[:, :skip] = 0", "scored[:, skip:] = 0"),
    ("q2", "skip leaves out the last tokens", "scored[:, :skip] = 0", "scored[:, len(scored[0]) - skip :] = 0"),
    ("q2", "the mask is overwritten", "scored[:, :skip] = 0", "mask[:, :skip] = False\nscored = mask.float()"),
    ("q2", "sequence means are summed", "per_row.clamp(min=1) / rows.clamp(min=1)", "per_row.clamp(min=1)"),
    ("q2", "one reduction for both", 'if reduction == "token":', "if True:"),
    ("q2", "the other reduction for both", 'if reduction == "token":', "if False:"),
    ("q2", "padding read in place of the prompt", "p + row[: n - 1] for p, row, n", "row[: n - 1] + p for p, row, n"),
    ("q2", "padding on the left", "tokens = pad_right(read)", "tokens = torch.tensor([[0] * (max(map(len, read)) - len(r)) + r for r in read])"),
    ("q2", "the first row's length for all", START, "start = torch.tensor([len(prompts[0]) - 1] * len(prompts))"),
    ("q2", "rows in another order", "lengths = mask.sum(1).tolist()", "prompts = sorted(prompts, key=len)\nlengths = mask.sum(1).tolist()"),
    ("q2", "weights in float64", "scored = mask.float()", "scored = mask.double()"),
    ("q2", "a mask without gaps is taken for granted", "scored = mask.float()", "scored = (torch.arange(mask.shape[1]) < mask.sum(1, keepdim=True)).float()"),
    ("q2", "the padding's states come along", PICK, "return states[:, -mask.shape[1] :].flatten(0, 1)[: len(row)]"),
    ("q2", "the prompts grow", "lengths = mask.sum(1).tolist()", "lengths = mask.sum(1).tolist()\nfor p, row, n in zip(prompts, ids.tolist(), lengths):\n    p.extend(row[: n - 1])\n    del p[len(p) - n + 1 :]\n    p.append(p.pop() + 0)\nprompts[0].append(0)\nprompts = [p[:-1] if i == 0 else p for i, p in enumerate(prompts)]"),
    # ---------------------------------------------------------------------------------------------------------- q3
    ("q3", "a query does not see itself", "keys[None, None] > slots[..., None]", "keys[None, None] >= slots[..., None].clamp(min=1)"),
    ("q3", "a query sees the slot after its own", "keys[None, None] > slots[..., None]", "keys[None, None] > slots[..., None] + 1"),
    ("q3", "everything is visible", "keys[None, None] > slots[..., None]", "keys[None, None] > slots[..., None] + held"),
    ("q3", "the first row's slots for all", "slots = slots + self.length[:, None]", "slots = slots + self.length[:1, None]"),
    ("q3", "written one slot too early", "self.values[layer][b, :, self.slots] = v", "self.values[layer][b, :, (self.slots - 1).clamp(min=0)] = v"),
    ("q3", "values are not stored", "self.values[layer][b, :, self.slots] = v.transpose(1, 2)\n", "pass\n"),
    ("q3", "the prefix is not attended to", "F.pad(own, (self.offset, 0))", "F.pad(own, (self.offset, 0), value=float('-inf'))"),
    ("q3", "cache positions off by one under padding", "cache.length = lengths\n", "cache.length = (lengths - 1).clamp(min=0)\n"),
    ("q3", "the padding counts as read", "cache.length = lengths\n", "pass\n"),
    ("q3", "the first token is predicted from the padding", "h = states[torch.arange(B), lengths - 1]", "h = states[:, -1]"),
    ("q3", "EOS left out of the mask", "mask.append(running)\n    running = running & ~torch.isin(token, eos_ids)\n", "running = running & ~torch.isin(token, eos_ids)\n    mask.append(running)\n"),
    ("q3", "EOS left out of the mask where it is the last token allowed", "mask.append(running)\n", "last = len(tokens) == max_new_tokens\n    mask.append(running & ~torch.isin(token, eos_ids) if last else running)\n"),
    ("q3", "one end token of several", "torch.isin(token, eos_ids)", "torch.isin(token, eos_ids[:1])"),
    ("q3", "rows go on after EOS", "running = running & ~torch.isin(token, eos_ids)", "running = ~torch.isin(token, eos_ids)"),
    ("q3", "the first row to end stops all", "or not running.any()", "or not running.all()"),
    ("q3", "the batch never stops early", " or not running.any()", ""),
    ("q3", "one token too few", "len(tokens) == max_new_tokens or", "len(tokens) == max(max_new_tokens - 1, 1) or"),
    ("q3", "one token too many", "len(tokens) == max_new_tokens or", "len(tokens) == max_new_tokens + 1 or"),
    ("q3", "ended rows are not filled with 0", "tokens.append(token * running)", "tokens.append(token)"),
    ("q3", "ended rows are filled with the end token", "tokens.append(token * running)", "tokens.append(torch.where(running, token, eos_ids[:1] if len(eos_ids) else 0))"),
    ("q3", "a mask of numbers", "torch.stack(mask, dim=1)", "torch.stack(mask, dim=1).long()"),
    ("q3", "greedy rollouts", SAMPLE, "token = sample(logits, 0, top_k, top_p, generator)"),
    ("q3", "temperature left out", SAMPLE, "token = sample(logits, float(temperature > 0), top_k, top_p, generator)"),
    ("q3", "temperature twice", SAMPLE, "token = sample(logits / (temperature or 1), temperature, top_k, top_p, generator)"),
    ("q3", "greedy below a temperature of a half", SAMPLE, "token = sample(logits, temperature if temperature >= 0.5 else 0, top_k, top_p, generator)"),
    ("q3", "a temperature of at least one", SAMPLE, "token = sample(logits, max(temperature, 1.0) if temperature else 0, top_k, top_p, generator)"),
    ("q3", "divided by the temperature in half precision", SAMPLE, "token = sample(logits / (temperature or 1), float(temperature > 0), top_k, top_p, generator)"),
    ("q3", "top-k left out", SAMPLE, "token = sample(logits, temperature, None, top_p, generator)"),
    ("q3", "top-k is one more", SAMPLE, "token = sample(logits, temperature, top_k and top_k + 1, top_p, generator)"),
    ("q3", "top-p left out", SAMPLE, "token = sample(logits, temperature, top_k, None, generator)"),
    ("q3", "the generator is ignored", SAMPLE, "token = sample(logits, temperature, top_k, top_p, None)"),
    ("q3", "the generator is ignored at a temperature of one", SAMPLE, "token = sample(logits, temperature, top_k, top_p, None if temperature == 1 else generator)"),
    ("q3", "a generator of one's own", SAMPLE, "token = sample(logits, temperature, top_k, top_p, torch.Generator().manual_seed(len(tokens)))"),
    ("q3", "the same random numbers for every token", SAMPLE, "token = sample(logits, temperature, top_k, top_p, generator and generator.clone_state())"),
    ("q3", "softmax and multinomial by hand, without top-k and top-p", SAMPLE, "token = logits.argmax(-1) if temperature == 0 else torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)[:, 0]"),
    ("q3", "keys and values are confused", "self.keys[layer] = F.pad(k,", "self.keys[layer] = F.pad(v,"),
    ("q3", "only the latest call's keys are kept", "k, v = self.keys[layer], self.values[layer]", "pass"),
    ("q3", "every call fills the cache", "self.filling = self.length is None", "self.filling = True"),
    ("q3", "what is kept has no gradient", "self.keys[layer] = F.pad(k,", "self.keys[layer] = F.pad(k.detach(),"),
    ("q3", "the whole row is read anew for every token", "h = model.hidden(tokens[-1][:, None], cache)[:, 0]", "whole = [list(p) + [t[b].item() for t in tokens] for b, p in enumerate(prompts)]\n    cache = KVCache(model.config, prefix=prefix)\n    h = model.hidden(pad_right(whole), cache)[torch.arange(B), lengths + len(tokens) - 1]"),
    # ---------------------------------------------------------------------------------------------------------- q4
    ("q4", "the context in the student's prompt", "system = [] if context is None else [SYSTEM, *encode(context)]", 'system = [SYSTEM, *encode(context or "style plain")]'),
    ("q4", "an empty context is taken for none", "[] if context is None else", "[] if not context else"),
    ("q4", "the teacher's prompt truncated", "else [SYSTEM, *encode(context)]", "else [SYSTEM, *encode(context)[:48]]"),
    ("q4", "the teacher's prompt truncated from the left", "return system + [USER, *encode(prompt), ASSISTANT]", "return (system + [USER, *encode(prompt), ASSISTANT])[-64:]"),
    ("q4", "the student's prompt truncated", "[USER, *encode(prompt), ASSISTANT]", "[USER, *encode(prompt)[:200], ASSISTANT]"),
    ("q4", "no assistant header for the teacher", "[USER, *encode(prompt), ASSISTANT]", "[USER, *encode(prompt)] + [ASSISTANT] * (context is None)"),
    ("q4", "the context after the prompt", "return system + [USER, *encode(prompt), ASSISTANT]", "return [USER, *encode(prompt), *system, ASSISTANT]"),
    ("q4", "the context inside the user's turn", "return system + [USER, *encode(prompt), ASSISTANT]", "return [USER, *encode((context + ' ' if context else '') + prompt), ASSISTANT]"),
    ("q4", "markers in a text become markers", "*encode(prompt), ASSISTANT", "*ENCODING.encode(prompt, allowed_special='all'), ASSISTANT"),
    ("q4", "texts are stripped", "*encode(prompt), ASSISTANT", "*encode(prompt.strip()), ASSISTANT"),
    ("q4", "the prompt is not dressed", "asked = dressed(template, row)", 'asked = as_turns("user", row["prompt"])'),
    ("q4", "shots are not dressed", "dressed(template, shot)", 'as_turns("user", shot["prompt"])'),
    ("q4", "shots are dressed with the prompt's own solution", "dressed(template, shot)", 'dressed(template, row | {"prompt": shot["prompt"]})'),
    ("q4", "the expert's demonstration is not shown", 'as_turns("assistant", expert(shot))', 'as_turns("assistant", shot["answer"])'),
    ("q4", "the answer is shown before the solution", 'as_turns("assistant", expert(shot))', 'as_turns("assistant", shot.get("answer") if "solution" in shot else expert(shot))'),
    ("q4", "the prompt before its context", BEFORE, 'before = dressed(template, row) + as_turns("system", text or None) + turns\n'),
    ("q4", "example turns dropped", BEFORE, 'before = as_turns("system", text or None)\n'),
    ("q4", "the context's turns after the shots", BEFORE + "for shot in shots:\n    " + SHOT, 'before = as_turns("system", text or None)\nfor shot in shots:\n    ' + SHOT + "\nbefore = before + turns"),
    ("q4", "earlier turns of the prompt dropped", "return [*earlier, last]", "return [last]"),
    ("q4", "shots without their answers", SHOT, "before = before + dressed(template, shot)"),
    ("q4", "shots without their prompts", SHOT, 'before = before + as_turns("assistant", expert(shot))'),
    ("q4", "shots before the example turns", SHOT, 'before = dressed(template, shot) + as_turns("assistant", expert(shot)) + before'),
    ("q4", "one shot only", "for shot in shots:", "for shot in shots[:1]:"),
    ("q4", "the system turn after the example turns", BEFORE, 'before = turns + as_turns("system", text or None)\n'),
    ("q4", "an empty system turn", BEFORE, 'before = as_turns("system", text) + turns\n'),
    ("q4", "no context is an empty list", "before or None", "before"),
    ("q4", "every turn of the prompt is dressed", "return [*earlier, last]", "if '{prompt}' in template:\n    earlier = [t | {'content': fill(template, values | {'prompt': t['content']})} for t in earlier]\nreturn [*earlier, last]"),
    ("q4", "the example turns are dressed, too", BEFORE, "if '{prompt}' in template or True:\n    turns = [t | {'content': fill(template or '{prompt}', row | {'prompt': t['content'], 'context': t['content']})} if t['role'] == 'user' else t for t in turns]\n" + BEFORE),
    ("q4", "the first turn is dressed", '*earlier, last = as_turns("user", row["prompt"])', 'last, *earlier = as_turns("user", row["prompt"])'),
    ("q4", "a line's own context is not shown", 'own = row.get("context", context)', "own = context"),
    ("q4", "a line's own context is shown beside the other", 'own = row.get("context", context)', 'own = as_turns("system", context) + as_turns("system", row.get("context"))'),
    ("q4", "the system turn is not dressed", 'text = fill(template, {"context": text}).strip()', "pass"),
    ("q4", "the template's own words need a system turn", 'if "{context}" in template:', 'if "{context}" in template and text:'),
    ("q4", "braces in a text are filled, too", 'last = last | {"content": fill(template, values)}', 'last = last | {"content": fill(fill(template, values), values)}'),
    ("q4", "the student's attempt is left out", '"attempt": attempt}', '"attempt": ""}'),
    ("q4", "the prompt is changed in place", 'last = last | {"content": fill(template, values)}', 'last["content"] = fill(template, values)'),
    ("q4", "the expert is imitated and graded alike", 'row.get("answer", said), said', "said, said"),
    ("q4", "the answer is imitated and graded alike", 'row.get("answer", said), said', 'row.get("answer", said), row.get("answer", said)'),
    ("q4", "the student reads the teacher's prompt", 'before or None, row["prompt"]', "before or None, asked"),
    ("q4", "the line is not kept", "said, asked, row)", "said, asked)"),
    # ---------------------------------------------------------------------------------------------------------- q5
    ("q5", "teacher not detached", "rows.scorer.model.head(h_t).detach()", "rows.scorer.model.head(h_t)"),
    ("q5", "the student's head for the teacher", "rows.scorer.model.head(h_t).detach()", "student.head(h_t).detach()"),
    ("q5", "the teacher does not see the context", TEACHER, TEACHER.replace("scorer_prompts", "prompts")),
    ("q5", "the context in the student's prompt", STUDENT, STUDENT.replace("rows.prompts", "rows.scorer_prompts")),
    ("q5", "no gradient to the student", STUDENT, STUDENT.replace("\n", ".detach().requires_grad_()\n")),
    ("q5", "the student is its own teacher", TEACHER, TEACHER.replace("rows.scorer.states", "Teacher(student, 'live').states")),
    ("q5", "gradient into the teacher's states", TEACHER, TEACHER.replace("rows.scorer.states(", "shared_states(rows.scorer.model, ")),
    ("q5", "the teacher's model is asked in place of the teacher", TEACHER, TEACHER.replace("h_t = rows", "with torch.no_grad(): h_t = rows").replace("rows.scorer.states(", "completion_states(rows.scorer.model, ")),
    ("q5", "the student's own weights are asked, with its adapters", TEACHER, TEACHER.replace("h_t = rows", "with torch.no_grad(): h_t = rows").replace("rows.scorer.states(", "completion_states(student if student.adapted else rows.scorer.model, ")),
    ("q5", "mean in place of the weights", LOSS, "loss, h = d.mean(), entropy(student_logits)\n"),
    ("q5", "mean over the tokens, whatever `sequence` and `skip` say", LOSS, "loss, h = d.sum() / rows.mask.sum(), entropy(student_logits)\n"),
    ("q5", "sum in place of the weights", LOSS, "loss, h = d.sum(), entropy(student_logits)\n"),
    ("q5", "mean of the weighted values", LOSS, "loss, h = (weights * d).mean(), entropy(student_logits)\n"),
    ("q5", "weights made to sum to one for every part", LOSS, "loss, h = (weights * d).sum() / weights.sum(), entropy(student_logits)\n"),
    ("q5", "divided by the number of rows", LOSS, "loss, h = (weights * d).sum() / len(rows.prompts), entropy(student_logits)\n"),
    ("q5", "the loss has no graph", LOSS, "loss, h = (weights * d).sum().detach(), entropy(student_logits)\n"),
    ("q5", "a temperature squared before the loss", LOSS, "d = d * 2.0**2\n    " + LOSS),
    ("q5", "values below zero are cut off", LOSS, "d = d.clamp(min=0)\n    " + LOSS),
    ("q5", "teacher and student change places", D, "d = rows.objective(teacher_logits, student_logits, tokens)\n"),
    ("q5", "always the squared distance", D, "d = ((student_logits - 2 * teacher_logits) ** 2).sum(-1)\n"),
    ("q5", "the next token in place of the token", D, "d = rows.objective(student_logits, teacher_logits, tokens.roll(-1))\n"),
    ("q5", "temperature in the student's logits", D, "d = rows.objective(student_logits / 2, teacher_logits, tokens)\n"),
    ("q5", "logits rounded to half precision", D, "d = rows.objective(student_logits.bfloat16().to(student_logits), teacher_logits, tokens)\n"),
    ("q5", "chunks lose the weights", GIVEN, GIVEN.replace("weights\n", "weights * 0 + 1\n")),
    ("q5", "chunks of another objective", GIVEN, GIVEN.replace("rows.objective", "cross_entropy")),
    ("q5", "chunks leave the student's head out", GIVEN, GIVEN.replace("student.head.weight", "student.head.weight.detach()")),
    ("q5", "chunks leave the student's states out", GIVEN, GIVEN.replace("h_s,", "h_s.detach().requires_grad_(),")),
    ("q5", "chunk ignored", "if chunk:", "if False:"),
    ("q5", "chunks of the default size", CHUNKS, "loss, _, h = chunked_objective(*given)"),
    ("q5", "the last, shorter chunk is dropped", CHUNKS, "n = len(tokens) // chunk * chunk or len(tokens)\n    loss, _, h = chunked_objective(h_s[:n], student.head.weight, h_t if h_t is None else h_t[:n], theirs, tokens[:n], rows.objective, weights[:n], chunk)\n    h = torch.cat([h, h.new_zeros(len(tokens) - n)])"),
    ("q5", "a teacher always", "if rows.scorer is not None:", "if True:"),
    ("q5", "nothing is learned without a teacher", STUDENT, STUDENT + "if rows.scorer is None:\n    return (0 * h_s).sum(), {}\n"),
    ("q5", "the log keeps the graph", LOG, LOG.replace("loss.detach()", "loss")),
    ("q5", "the mean entropy is logged, whatever the weights", LOG, LOG.replace("(weights * h).sum()", "h.mean()")),
    ("q5", "the teacher's entropy is logged", LOSS, LOSS.replace("entropy(student_logits)", "entropy(teacher_logits if h_t is not None else student_logits)")),
    ("q5", "backward is called here", LOG, "loss.backward(retain_graph=True)\n" + LOG),
    ("q5", "the weights are changed in place", LOG, "rows.weights.div_(2)\n" + LOG),
    ("q5", "the likeliest token's probability", "q.gather(-1, tokens)[:, 0], p.gather(-1, tokens)[:, 0]", "q.amax(-1), p.amax(-1)"),
    ("q5", "student and scorer change places", "return q.gather(-1, tokens)[:, 0], p.gather(-1, tokens)[:, 0]", "return p.gather(-1, tokens)[:, 0], q.gather(-1, tokens)[:, 0]"),
    ("q5", "log-probabilities for probabilities", "return q.gather(-1, tokens)[:, 0], p", "return q.gather(-1, tokens)[:, 0].log(), p"),
    ("q5", "the scorer's probabilities without its context", "h_t = rows.scorer.states(rows.scorer_prompts, rows.ids, rows.mask)\nq, p", "h_t = rows.scorer.states(rows.prompts, rows.ids, rows.mask)\nq, p"),
]
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
