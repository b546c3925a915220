//! Conversations as tokens: which stretches of the rendered text are learnt.
//!
//! A turn is found by rendering prefixes of the conversation, as it is met in use: what the conversation up to the answer
//! has beyond the same conversation up to where the assistant speaks. Some templates write an earlier turn differently
//! (they drop its reasoning); there, and for other roles, the turn is what changes in the text when its content changes. The
//! text is cut at the turns and every piece tokenised apart, so that a token is learnt whole or not at all.

use std::ops::Range;

use super::{Example, Format, Result};
use crate::base::{ChatTemplate, Message};

impl Format<'_> {
    /// A conversation whose messages of the chosen roles are learnt, or the last of them; what follows it is left out.
    /// `None` where there is none.
    pub(super) fn conversation(&self, template: &ChatTemplate, messages: &[Message]) -> Result<Option<Example>> {
        let roles = &self.options().train_on;
        let messages = self.with_system(messages.to_vec(), None);
        let is_learnt = |message: &Message| match roles.as_slice() {
            [] => message.role == ASSISTANT,
            roles => roles.contains(&message.role),
        };
        let Some(last) = messages.iter().rposition(is_learnt) else { return Ok(None) };
        let (before, learnt) = (&messages[..last], &messages[last]);
        if before.is_empty() && learnt.role == ASSISTANT {
            return Ok(None);
        }
        let earlier = if self.options().mask_history { 0..0 } else { 0..last };
        let turns: Vec<usize> = earlier.filter(|&index| is_learnt(&messages[index])).collect();
        if learnt.role == ASSISTANT {
            let mut example = self.turn(template, before, &learnt.content)?;
            if !turns.is_empty() {
                let text = template.render(before, true)?;
                let render = |messages: &[Message]| template.render(&messages[..last], true);
                let spans = self.spans(template, &messages, &turns, &text, &render)?;
                (example.prompt_ids, example.prompt_mask) = self.masked_ids(&text, &spans)?;
            }
            return Ok(Some(example));
        }
        let text = template.render(&messages[..=last], false)?;
        let render = |messages: &[Message]| template.render(&messages[..=last], false);
        let all: Vec<usize> = turns.into_iter().chain([last]).collect();
        let mut spans = self.spans(template, &messages, &all, &text, &render)?;
        let Some(span) = spans.pop().filter(|span| span.start > 0) else { return Ok(None) };
        let (prompt_ids, prompt_mask) = self.masked_ids(&text[..span.start], &spans)?;
        let completion_ids = self.continuation(&text[span])?;
        Ok(Some(Example { prompt_ids, prompt_mask, completion_ids, label: None }))
    }

    /// The prompt and the answer that follows it. The answer is what the whole conversation has beyond the prompt; where
    /// a template writes an answered turn differently, it is the answer alone.
    pub(super) fn turn(&self, template: &ChatTemplate, before: &[Message], answer: &str) -> Result<Example> {
        let prompt = template.render(before, true)?;
        let prompt_ids = self.rendered_ids(&prompt)?;
        let whole = template.render(&answered(before, answer), false)?;
        let rest = whole.strip_prefix(&prompt).filter(|rest| rest.contains(answer.trim()));
        let completion_ids = match rest {
            Some(rest) => self.until_end_of_turn(rest)?,
            None => self.ended(self.continuation(answer)?),
        };
        Ok(Example { prompt_ids, completion_ids, ..Example::default() })
    }

    /// Cuts what a template writes after the token that ends the turn, such as a line break before the next one.
    fn until_end_of_turn(&self, rest: &str) -> Result<Vec<u32>> {
        let tokenizer = self.tokenizer();
        let mut ids = self.continuation(rest)?;
        if let Some(end) = ids.iter().rposition(|&id| tokenizer.is_eos(id)) {
            let after = tokenizer.decode(ids.get(end + 1..).unwrap_or_default(), true)?;
            if after.trim().is_empty() {
                ids.truncate(end + 1);
                return Ok(ids);
            }
        }
        let ids = self.continuation(rest.trim_end())?;
        match ids.last() {
            // The turn ends with a token that the checkpoint does not list among those that end generation.
            Some(&last) if tokenizer.is_special(last) => Ok(ids),
            _ => Ok(self.ended(ids)),
        }
    }

    /// Where in `text`, which `render` makes of `messages`, the turns with these numbers are learnt. Turns that the template
    /// leaves out have no place.
    fn spans(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        turns: &[usize],
        text: &str,
        render: &dyn Fn(&[Message]) -> crate::base::Result<String>,
    ) -> Result<Vec<Range<usize>>> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        for &turn in turns {
            let span = match self.met_in_use(template, messages, turn, text) {
                Some(span) => Some(span),
                None => self.changed(messages, turn, text, render)?,
            };
            let end = spans.last().map_or(0, |last| last.end);
            spans.extend(span.filter(|span| span.start >= end && !span.is_empty()));
        }
        Ok(spans)
    }

    /// The turn as generation makes it: from where the template lets the assistant speak to the end of the turn.
    fn met_in_use(
        &self,
        template: &ChatTemplate,
        messages: &[Message],
        turn: usize,
        text: &str,
    ) -> Option<Range<usize>> {
        let content = messages.get(turn).filter(|message| message.role == ASSISTANT)?.content.trim();
        let before = template.render(&messages[..turn], true).ok()?;
        let through = template.render(&messages[..=turn], false).ok()?;
        let rest = through.strip_prefix(&before).filter(|rest| rest.contains(content))?;
        if !text.starts_with(&through) {
            return None;
        }
        Some(before.len()..before.len() + self.end_of_turn(rest).unwrap_or_else(|| rest.trim_end().len()))
    }

    /// The end of the last token of `text` that ends a turn, where only white space follows it.
    fn end_of_turn(&self, text: &str) -> Option<usize> {
        let tokens = self.tokenizer().eos_ids().iter().filter_map(|&id| self.tokenizer().token(id));
        let end = tokens.filter_map(|token| Some(text.rfind(&token)? + token.len())).max()?;
        text[end..].trim().is_empty().then_some(end)
    }

    /// The part of the text that the turn's content stands in, and the token that ends the turn where it comes next.
    fn changed(
        &self,
        messages: &[Message],
        turn: usize,
        text: &str,
        render: &dyn Fn(&[Message]) -> crate::base::Result<String>,
    ) -> Result<Option<Range<usize>>> {
        let Some(content) = messages.get(turn).map(|message| message.content.as_str()) else { return Ok(None) };
        let mut others = messages.to_vec();
        if let Some(other) = others.get_mut(turn) {
            other.content = unlike(content).into();
        }
        let other = render(&others)?;
        if other == text {
            return Ok(None);
        }
        let start = text.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        let shortest = text.len().min(other.len()) - start;
        let same = text.bytes().rev().zip(other.bytes().rev()).take(shortest).take_while(|(a, b)| a == b).count();
        let end = text.len() - same;
        let Some(rest) = text.get(end..).filter(|_| text.is_char_boundary(start)) else { return Ok(None) };
        let next = rest.trim_start();
        let ends = self.tokenizer().eos_ids().iter().filter_map(|&id| self.tokenizer().token(id));
        let ended =
            ends.filter(|token| next.starts_with(token)).map(|token| text.len() - next.len() + token.len()).max();
        Ok(Some(start..ended.unwrap_or(end)))
    }

    /// A rendered text in tokens, and which of them lie in the spans, which are in order.
    fn masked_ids(&self, text: &str, spans: &[Range<usize>]) -> Result<(Vec<u32>, Vec<bool>)> {
        let first = spans.first().map_or(text.len(), |span| span.start);
        let mut ids = self.rendered_ids(&text[..first])?;
        let mut mask = vec![false; ids.len()];
        let mut push = |text: &str, learnt: bool| -> Result<()> {
            let more = self.continuation(text)?;
            mask.extend(std::iter::repeat_n(learnt, more.len()));
            ids.extend(more);
            Ok(())
        };
        for (index, span) in spans.iter().enumerate() {
            let next = spans.get(index + 1).map_or(text.len(), |next| next.start);
            push(&text[span.clone()], true)?;
            push(&text[span.end..next], false)?;
        }
        Ok((ids, mask))
    }
}

const ASSISTANT: &str = "assistant";

fn answered(before: &[Message], answer: &str) -> Vec<Message> {
    before.iter().cloned().chain([Message::new(ASSISTANT, answer)]).collect()
}

/// A text that begins and ends otherwise than `content`, with or without the white space around it.
fn unlike(content: &str) -> &'static str {
    let trimmed = content.trim();
    let edges = [content, trimmed].map(|text| [text.chars().next(), text.chars().next_back()]);
    let differs = |text: &&str| !edges.as_flattened().contains(&text.chars().next());
    ["0", "1", "2", "3", "4"].into_iter().find(differs).unwrap_or("0")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::base::Tokenizer;
    use crate::base::testing::{CHATML, ascii_tokenizer, smollm2};
    use crate::data::{FormatOptions, Record};

    /// The structure of Llama 3's template: a header of two tokens, contents trimmed, a token before the text.
    const LLAMA3: &str = "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_start|>\n\n' + \
                          m['content'] | trim + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ \
                          '<|im_start|>assistant<|im_start|>\n\n' }}{% endif %}";

    /// As Qwen 3 does it: reasoning is kept in the last answer only, and announced to it.
    const REASONING: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last \
                             %}{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% \
                             endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

    fn chat(turns: &[(&str, &str)]) -> Record {
        Record::Chat { messages: turns.iter().map(|(role, content)| Message::new(role, *content)).collect() }
    }

    fn format<'t>(tokenizer: &'t Tokenizer, roles: &[&str]) -> Format<'t> {
        let train_on = roles.iter().map(ToString::to_string).collect();
        Format::new(tokenizer, tokenizer.vocab_size(), FormatOptions { train_on, ..FormatOptions::default() }).unwrap()
    }

    /// The example's text, with what is learnt between brackets.
    fn shown(format: &Format<'_>, record: &Record) -> String {
        let example = format.examples(record).unwrap().remove(0);
        let tokens: Vec<(u32, bool)> = example.tokens().collect();
        let runs = tokens.chunk_by(|a, b| a.1 == b.1).map(|run| {
            let ids: Vec<u32> = run.iter().map(|(id, _)| *id).collect();
            let text = format.tokenizer().decode(&ids, false).unwrap();
            if run[0].1 { format!("⟦{text}⟧") } else { text }
        });
        runs.collect()
    }

    const TURNS: [(&str, &str); 6] = [
        ("system", "S"),
        ("user", "a"),
        ("assistant", " b\n"),
        ("user", "assistant"),
        ("assistant", "a"),
        ("user", "end"),
    ];

    #[test]
    fn every_answer_of_a_chatml_conversation_is_learnt_with_its_end() {
        let tokenizer = ascii_tokenizer(Some(CHATML));
        insta::assert_snapshot!(shown(&format(&tokenizer, &["assistant"]), &chat(&TURNS)), @"
        <|im_start|>system
        S<|im_end|>
        <|im_start|>user
        a<|im_end|>
        <|im_start|>assistant
        ⟦ b
        <|im_end|>⟧
        <|im_start|>user
        assistant<|im_end|>
        <|im_start|>assistant
        ⟦a<|im_end|>⟧
        ");
        let without = chat(&TURNS[..5]);
        assert_eq!(
            shown(&format(&tokenizer, &["assistant"]), &without),
            shown(&format(&tokenizer, &["assistant"]), &chat(&TURNS))
        );
        assert_eq!(shown(&format(&tokenizer, &[]), &without), shown(&format(&tokenizer, &["assistant"]), &without));
        let options = FormatOptions { mask_history: true, ..FormatOptions::default() };
        let last = shown(&Format::new(&tokenizer, tokenizer.vocab_size(), options).unwrap(), &without);
        assert!(last.ends_with("assistant\n⟦a<|im_end|>⟧") && last.matches('⟦').count() == 1, "{last}");
    }

    #[test]
    fn a_template_of_the_options_is_used_in_place_of_the_tokenizer_s() {
        let own = ascii_tokenizer(Some(LLAMA3));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chatml.jinja");
        std::fs::write(&file, CHATML).unwrap();
        let expected = shown(&format(&ascii_tokenizer(Some(CHATML)), &[]), &chat(&TURNS));
        let with = |template: &str| {
            let options = FormatOptions { chat_template: Some(template.into()), ..FormatOptions::default() };
            Format::new(&own, own.vocab_size(), options)
        };
        for template in [CHATML, file.to_str().unwrap()] {
            assert_eq!(shown(&with(template).unwrap(), &chat(&TURNS)), expected);
        }
        assert!(with("nowhere.jinja").unwrap_err().to_string().contains("nowhere.jinja"));
        assert!(with("{% if %}").is_err());
    }

    #[test]
    fn every_answer_of_a_llama_3_conversation_is_learnt_with_its_end() {
        let tokenizer = ascii_tokenizer(Some(LLAMA3));
        insta::assert_snapshot!(shown(&format(&tokenizer, &["assistant"]), &chat(&TURNS)), @"
        <s><|im_start|>system<|im_start|>

        S<|im_end|><|im_start|>user<|im_start|>

        a<|im_end|><|im_start|>assistant<|im_start|>

        ⟦b<|im_end|>⟧<|im_start|>user<|im_start|>

        assistant<|im_end|><|im_start|>assistant<|im_start|>

        ⟦a<|im_end|>⟧
        ");
    }

    #[test]
    fn other_roles_can_be_learnt() {
        let tokenizer = ascii_tokenizer(Some(CHATML));
        insta::assert_snapshot!(shown(&format(&tokenizer, &["user"]), &chat(&TURNS)), @"
        <|im_start|>system
        S<|im_end|>
        <|im_start|>user
        ⟦a<|im_end|>⟧
        <|im_start|>assistant
         b
        <|im_end|>
        <|im_start|>user
        ⟦assistant<|im_end|>⟧
        <|im_start|>assistant
        a<|im_end|>
        <|im_start|>user
        ⟦end<|im_end|>⟧
        ");
        insta::assert_snapshot!(shown(&format(&tokenizer, &["user", "assistant"]), &chat(&TURNS)), @"
        <|im_start|>system
        S<|im_end|>
        <|im_start|>user
        ⟦a<|im_end|>⟧
        <|im_start|>assistant
        ⟦ b
        <|im_end|>⟧
        <|im_start|>user
        ⟦assistant<|im_end|>⟧
        <|im_start|>assistant
        ⟦a<|im_end|>⟧
        <|im_start|>user
        ⟦end<|im_end|>⟧
        ");
        assert!(format(&tokenizer, &["tool"]).examples(&chat(&TURNS)).unwrap().is_empty());
    }

    #[test]
    fn an_earlier_turn_that_is_written_differently_is_learnt_as_it_is_written() {
        let tokenizer = ascii_tokenizer(Some(REASONING));
        let turns = [("user", "q"), ("assistant", "why</think>b"), ("user", "r"), ("assistant", "so</think>c")];
        insta::assert_snapshot!(shown(&format(&tokenizer, &["assistant"]), &chat(&turns)), @"
        <|im_start|>user
        q<|im_end|>
        <|im_start|>assistant
        ⟦b<|im_end|>⟧
        <|im_start|>user
        r<|im_end|>
        <|im_start|>assistant
        ⟦so</think>c<|im_end|>⟧
        ");
    }

    #[test]
    fn the_prompt_can_be_learnt_too() {
        let tokenizer = ascii_tokenizer(None);
        let options = FormatOptions { train_on_prompt: true, ..FormatOptions::default() };
        let format = Format::new(&tokenizer, 1000, options).unwrap();
        let record = Record::Completion { prompt: "p".into(), completion: "c".into(), system: None };
        assert_eq!(shown(&format, &record), "<s>⟦pc</s>⟧");
        assert_eq!(shown(&format, &Record::Text { text: "t".into() }), "<s>⟦t</s>⟧");
    }

    /// The real template and tokenizer: pieces tokenised apart are the ids of the whole text, and the mask covers exactly
    /// the answers' own tokens.
    #[test]
    fn smollm2_masks_are_exact() {
        let Some(gguf) = smollm2() else { return };
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        let format = format(&tokenizer, &["assistant"]);
        let turns = [
            ("user", "What is 2 + 2?"),
            ("assistant", "2 + 2 = 4.\n\n```python\nprint(2 + 2)\n```"),
            ("user", "assistant\nAnd in 日本語?"),
            ("assistant", "四です 👍🏽"),
            ("user", "Thanks!"),
            ("assistant", "You are welcome."),
        ];
        let Record::Chat { messages } = chat(&turns) else { panic!() };
        let example = format.examples(&chat(&turns)).unwrap().remove(0);
        let whole = tokenizer.chat_template().unwrap().render(&messages, false).unwrap();
        let ids: Vec<u32> = example.tokens().map(|(id, _)| id).collect();
        assert_eq!(ids, tokenizer.encode(whole.trim_end(), false).unwrap());
        assert_eq!(example.prompt_ids, format.chat_prompt(&messages[..5]).unwrap());
        let learnt: Vec<u32> = example.tokens().filter(|(_, learnt)| *learnt).map(|(id, _)| id).collect();
        let answers = turns.iter().filter(|(role, _)| *role == "assistant");
        let expected: Vec<u32> =
            answers.flat_map(|(_, text)| tokenizer.encode(&format!("{text}<|im_end|>"), false).unwrap()).collect();
        assert_eq!(learnt, expected);
    }

    /// Tokens and masks by transformers for two real forms of templates: `fixtures/data/make.py`.
    #[test]
    fn masks_are_those_of_transformers() {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data");
        let oracle: serde_json::Value = crate::files::read_json(&fixtures.join("masks.json"), "masks").unwrap();
        let cases = oracle["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 80);
        for name in ["chatml", "llama3"] {
            let tokenizer = Tokenizer::from_folder(&fixtures.join(name)).unwrap();
            let format = format(&tokenizer, &["assistant"]);
            for case in cases.iter().filter(|case| case["folder"] == name) {
                let messages = serde_json::from_value(case["messages"].clone()).unwrap();
                let example = format.examples(&Record::Chat { messages }).unwrap().remove(0);
                let tokens: Vec<(u32, bool)> = example.tokens().collect();
                let number = |field: &str| case[field].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as u32);
                let mut expected: Vec<(u32, bool)> = number("ids").zip(number("mask").map(|m| m == 1)).collect();
                // what a template writes after the last answer is not learnt and not kept
                expected.truncate(expected.iter().rposition(|(_, learnt)| *learnt).unwrap() + 1);
                assert_eq!(tokens, expected, "{case}");
            }
        }
    }

    proptest! {
        /// Whatever is said, the learnt text is the answers, each with its end.
        #[test]
        fn the_mask_is_the_answers(contents in proptest::collection::vec("[a-c \n]{0,6}", 1..5)) {
            for (template, trims) in [(CHATML, false), (LLAMA3, true)] {
                let tokenizer = ascii_tokenizer(Some(template));
                let turns = contents.iter().flat_map(|text| [("user", text.as_str()), ("assistant", text.as_str())]);
                let found = shown(&format(&tokenizer, &["assistant"]), &chat(&turns.collect::<Vec<_>>()));
                let learnt: Vec<&str> = found.split('⟦').skip(1).filter_map(|part| part.split('⟧').next()).collect();
                let text = |text: &String| if trims { text.trim().to_string() } else { text.clone() };
                let expected: Vec<String> = contents.iter().map(|content| format!("{}<|im_end|>", text(content))).collect();
                prop_assert_eq!(learnt, expected);
            }
        }
    }
}
