//! A better and a worse answer, in the forms that data sets write them in.

use serde_json::Value;

use super::Parser;
use crate::base::Message;
use crate::data::Result;
use crate::data::layout::lookup;
use crate::data::record::{Prompt, Record};

impl Parser<'_> {
    pub(super) fn preference(&self) -> Result<Record> {
        let fields = &self.options.fields;
        let (chosen, rejected) = (self.get(&fields.chosen)?, self.get(&fields.rejected)?);
        let prompt = lookup(self.record, &fields.prompt);
        let system = self.optional(&fields.system)?;
        if let (Value::String(chosen), Value::String(rejected)) = (chosen, rejected)
            && !prompt.is_some_and(Value::is_array)
            && !self.is_list(chosen)
        {
            let (chosen, rejected) = (chosen.clone(), rejected.clone());
            return Ok(match prompt {
                Some(prompt) => {
                    let prompt = Prompt::Text(self.string(prompt, &fields.prompt)?);
                    Record::Preference { prompt, chosen, rejected, system }
                }
                None => split_texts(&chosen, &rejected, system),
            });
        }
        let mut shared = match prompt {
            Some(Value::String(text)) => vec![Message::new("user", text.clone())],
            Some(value) => self.messages(value, &fields.prompt)?,
            None => Vec::new(),
        };
        let chosen = self.answer(chosen, &fields.chosen)?;
        let rejected = self.answer(rejected, &fields.rejected)?;
        let no_message = |name: &str| self.fail(name, "holds no message");
        let (chosen, chosen_before) = chosen.split_last().ok_or_else(|| no_message(&fields.chosen))?;
        let (rejected, rejected_before) = rejected.split_last().ok_or_else(|| no_message(&fields.rejected))?;
        if chosen_before != rejected_before {
            let reason = "has other messages before its last than the chosen one";
            return Err(self.fail(&fields.rejected, reason));
        }
        // answers that are whole conversations hold the prompt; otherwise they go on where it ends
        if !chosen_before.starts_with(&shared) && chosen_before.iter().any(|message| message.role != "assistant") {
            shared.clear();
        }
        let rest = chosen_before.strip_prefix(shared.as_slice()).unwrap_or(chosen_before);
        shared.extend_from_slice(rest);
        if shared.is_empty() {
            return Err(self.fail(&fields.prompt, "is missing, and the answers have no message before their last"));
        }
        for (last, name) in [(chosen, &fields.chosen), (rejected, &fields.rejected)] {
            if last.role != "assistant" {
                let reason = format!("must end with a message of the role `assistant`; the last is of `{}`", last.role);
                return Err(self.fail(name, reason));
            }
        }
        self.add_system(&mut shared)?;
        let (chosen, rejected) = (chosen.content.clone(), rejected.content.clone());
        Ok(Record::Preference { prompt: Prompt::Messages(shared), chosen, rejected, system: None })
    }

    /// Messages, or a text as the one message of the assistant.
    fn answer(&self, value: &Value, name: &str) -> Result<Vec<Message>> {
        match value {
            Value::String(text) if !self.is_list(text) => Ok(vec![Message::new("assistant", text.clone())]),
            Value::Object(_) => Ok(vec![self.message(value, name)?]),
            value => self.messages(value, name),
        }
    }
}

/// What two whole texts begin with is the prompt. It ends where a word ends, so that no word is divided.
fn split_texts(chosen: &str, rejected: &str, system: Option<String>) -> Record {
    let same = |((at, a), b): ((usize, char), char)| (a == b).then_some(at + a.len_utf8());
    let common = chosen.char_indices().zip(rejected.chars()).map_while(same).last().unwrap_or(0);
    let ends_word = |text: &str| text[common..].chars().next().is_none_or(char::is_whitespace);
    let end = if ends_word(chosen) && ends_word(rejected) {
        common
    } else {
        // the space goes to the answer
        chosen[..common].rfind(char::is_whitespace).unwrap_or(0)
    };
    let (prompt, chosen) = chosen.split_at(end);
    Record::Preference {
        prompt: Prompt::Text(prompt.into()),
        chosen: chosen.into(),
        rejected: rejected[end..].into(),
        system,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::{messages, record};
    use super::*;

    #[test]
    fn the_forms_of_a_preference_are_one() {
        let pair =
            |prompt: Prompt| Record::Preference { prompt, chosen: "a".into(), rejected: "b".into(), system: None };
        assert_eq!(record(json!({"prompt": "p", "chosen": "a", "rejected": "b"})), pair(Prompt::Text("p".into())));
        let p = json!({"role": "user", "content": "p"});
        let answer = |text: &str| json!({"role": "assistant", "content": text});
        let expected = pair(Prompt::Messages(messages(&[("user", "p")])));
        for record_of in [
            json!({"prompt": [p], "chosen": [answer("a")], "rejected": [answer("b")]}),
            json!({"prompt": [p], "chosen": "a", "rejected": "b"}),
            json!({"prompt": "p", "chosen": [answer("a")], "rejected": [answer("b")]}),
            json!({"prompt": "p", "chosen": [p, answer("a")], "rejected": [p, answer("b")]}),
            json!({"prompt": "another spelling of p", "chosen": [p, answer("a")], "rejected": [p, answer("b")]}),
            json!({"chosen": [p, answer("a")], "rejected": [p, answer("b")]}),
            json!({"prompt": [p], "chosen": answer("a"), "rejected": answer("b")}),
        ] {
            assert_eq!(record(record_of.clone()), expected, "{record_of}");
        }
    }

    #[test]
    fn whole_texts_are_divided_between_words() {
        let split = |chosen: &str, rejected: &str| {
            let record = record(json!({"chosen": chosen, "rejected": rejected}));
            let Record::Preference { prompt: Prompt::Text(prompt), chosen, rejected, .. } = record else { panic!() };
            [prompt, chosen, rejected]
        };
        assert_eq!(split("Q: x A: I think", "Q: x A: I thought"), ["Q: x A: I", " think", " thought"]);
        assert_eq!(split("A: yes", "A:"), ["A:", " yes", ""]);
        assert_eq!(split("äö", "äü"), ["", "äö", "äü"]);
        assert_eq!(split("same", "same"), ["same", "", ""]);
    }
}
