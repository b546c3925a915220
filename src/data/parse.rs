//! A row of a file as a record.

mod preference;

use serde_json::{Map, Value};

use super::layout::{Fields, Layout, lookup};
use super::place::{Place, nearest, suggestion};
use super::record::Record;
use super::source::{Row, describe};
use super::{Error, Result};
use crate::base::Message;

/// How rows are read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// What a record looks like; where not given, the first record tells.
    pub layout: Option<Layout>,
    /// The names of the fields.
    pub fields: Fields,
    /// The classes of integer labels: label 0 is the first. Where there are any, no other label is allowed.
    pub label_names: Vec<String>,
    /// Whether a conversation may end with another message than the assistant's.
    pub open_ended: bool,
}

/// Reads one record.
struct Parser<'a> {
    options: &'a ReadOptions,
    layout: Layout,
    place: &'a Place,
    record: &'a Map<String, Value>,
    of_table: bool,
}

/// The layout of a file's first row.
pub(super) fn layout_of(row: &Row, options: &ReadOptions) -> Result<Layout> {
    let fields = &options.fields;
    if let Some(layout) = options.layout.or_else(|| Layout::detect(&row.fields, fields)) {
        return Ok(layout);
    }
    let names: Vec<&str> = row.fields.keys().take(10).map(String::as_str).collect();
    let known = Layout::known(fields);
    let near = names.iter().find_map(|name| Some((name, nearest(name, known.iter().copied())?)));
    let mut found = if names.is_empty() { "none".into() } else { names.join(", ") };
    if let Some((name, meant)) = near {
        found += &format!("; did you mean `{meant}` by `{name}`?");
    }
    Err(Error::UnknownLayout { place: row.place.clone(), found })
}

/// A row as a record of `layout`.
pub(super) fn parse(row: &Row, layout: Layout, options: &ReadOptions) -> Result<Record> {
    Parser { options, layout, place: &row.place, record: &row.fields, of_table: row.of_table }.record()
}

impl<'a> Parser<'a> {
    fn record(&self) -> Result<Record> {
        let fields = &self.options.fields;
        let needed = self.layout.needed(fields);
        let has_none = needed.iter().all(|name| lookup(self.record, name).is_none());
        if has_none && let Some(found) = Layout::detect(self.record, fields).filter(|found| *found != self.layout) {
            return Err(Error::Mixed {
                place: self.place.clone(),
                found,
                expected: self.layout,
                asked_for: self.options.layout.is_some(),
            });
        }
        Ok(match self.layout {
            Layout::Classification => Record::Classification { text: self.text(&fields.text)?, label: self.label()? },
            Layout::Completion => Record::Completion {
                prompt: self.text(&fields.prompt)?,
                completion: self.text(&fields.completion)?,
                system: self.optional(&fields.system)?,
            },
            Layout::Text => Record::Text { text: self.text(&fields.text)? },
            Layout::Alpaca => Record::Instruction {
                instruction: self.text(&fields.instruction)?,
                input: self.optional(&fields.input)?.unwrap_or_default(),
                output: self.text(&fields.output)?,
                system: self.optional(&fields.system)?,
            },
            Layout::Messages => Record::Chat { messages: self.conversation(&fields.messages)? },
            Layout::Sharegpt => Record::Chat { messages: self.conversation(&fields.conversations)? },
            Layout::Preference => self.preference()?,
        })
    }

    fn fail(&self, field: impl Into<String>, reason: impl Into<String>) -> Error {
        Error::Field { place: self.place.clone(), field: field.into(), reason: reason.into(), layout: self.layout }
    }

    fn get(&self, name: &str) -> Result<&'a Value> {
        lookup(self.record, name).ok_or_else(|| {
            let needed = self.layout.needed(&self.options.fields);
            let others = self.record.keys().map(String::as_str).filter(|key| !needed.contains(key));
            let meant = nearest(name, others).map(|found| format!("; is it what the record calls `{found}`?"));
            self.fail(name, format!("is missing{}", meant.unwrap_or_default()))
        })
    }

    fn text(&self, name: &str) -> Result<String> {
        self.string(self.get(name)?, name)
    }

    /// A text that may be absent; an empty one is as good as absent.
    fn optional(&self, name: &str) -> Result<Option<String>> {
        let text = lookup(self.record, name).map(|value| self.string(value, name)).transpose()?;
        Ok(text.filter(|text| !text.trim().is_empty()))
    }

    fn string(&self, value: &Value, field: &str) -> Result<String> {
        match value {
            Value::String(text) => Ok(text.clone()),
            other => Err(self.fail(field, format!("must be a string; it is {}", describe(other)))),
        }
    }

    fn label(&self) -> Result<String> {
        let name = &self.options.fields.label;
        let label = match self.get(name)? {
            Value::String(label) if !label.trim().is_empty() => label.clone(),
            Value::String(_) => return Err(self.fail(name, "must not be empty")),
            Value::Number(number) => number.to_string(),
            other => return Err(self.fail(name, format!("must be a string or a number; it is {}", describe(other)))),
        };
        let names = &self.options.label_names;
        if names.is_empty() || names.contains(&label) {
            return Ok(label);
        }
        let Ok(index) = label.parse::<usize>() else {
            let meant = suggestion(&label, names.iter().map(String::as_str));
            return Err(self.fail(name, format!("is `{label}`, which label_names does not list{meant}")));
        };
        names
            .get(index)
            .cloned()
            .ok_or_else(|| self.fail(name, format!("is {index}, but label_names lists {} labels, from 0", names.len())))
    }

    /// A conversation in which there is something to learn.
    fn conversation(&self, name: &str) -> Result<Vec<Message>> {
        let mut messages = self.messages(self.get(name)?, name)?;
        match messages.last() {
            None => return Err(self.fail(name, "is empty")),
            Some(last) if last.role != "assistant" && !self.options.open_ended => {
                let reason = format!("must end with a message of the role `assistant`; the last is of `{}`", last.role);
                return Err(self.fail(name, reason));
            }
            Some(_) if messages.len() < 2 && !self.options.open_ended => {
                return Err(self.fail(name, "must have a message before the assistant's"));
            }
            Some(_) => {}
        }
        self.add_system(&mut messages)?;
        Ok(messages)
    }

    /// Puts the record's own system prompt before messages that have none.
    fn add_system(&self, messages: &mut Vec<Message>) -> Result<()> {
        let has_own = messages.first().is_some_and(|message| message.role == "system");
        if let Some(system) = self.optional(&self.options.fields.system)?.filter(|_| !has_own) {
            messages.insert(0, Message::new("system", system));
        }
        Ok(())
    }

    /// A list of messages; in a table, the JSON text of one.
    fn messages(&self, value: &Value, name: &str) -> Result<Vec<Message>> {
        match value {
            Value::Array(values) => values
                .iter()
                .enumerate()
                .map(|(index, value)| self.message(value, &format!("{name}[{index}]")))
                .collect(),
            Value::String(text) if self.is_list(text) => {
                let parsed: Value = serde_json::from_str(text)
                    .map_err(|error| self.fail(name, format!("holds a list that is not JSON: {error}")))?;
                self.messages(&parsed, name)
            }
            other => Err(self.fail(name, format!("must be an array; it is {}", describe(other)))),
        }
    }

    fn is_list(&self, text: &str) -> bool {
        self.of_table && text.trim_start().starts_with("[{")
    }

    fn message(&self, value: &Value, at: &str) -> Result<Message> {
        let fields = &self.options.fields;
        let Some(message) = value.as_object() else {
            let (role, content) = (&fields.role, &fields.content);
            let reason = format!("must be an object with `{role}` and `{content}`; it is {}", describe(value));
            return Err(self.fail(at, reason));
        };
        let is_sharegpt = lookup(message, &fields.role).is_none()
            && (self.layout == Layout::Sharegpt || lookup(message, &fields.from).is_some());
        let names = if is_sharegpt { (&fields.from, &fields.value) } else { (&fields.role, &fields.content) };
        let part = |name: &str| {
            lookup(message, name).ok_or_else(|| {
                let reason = if message.contains_key(name) {
                    let calls = message.get("tool_calls").is_some_and(|calls| !calls.is_null());
                    format!("is null{}", if calls { "; calls of tools are not learnt" } else { "" })
                } else {
                    format!("is missing{}", suggestion(name, message.keys().map(String::as_str)))
                };
                self.fail(format!("{at}.{name}"), reason)
            })
        };
        let role = self.string(part(names.0)?, &format!("{at}.{}", names.0))?;
        let content = self.content(part(names.1)?, &format!("{at}.{}", names.1))?;
        let role = if is_sharegpt { self.sharegpt_role(&role, &format!("{at}.{}", names.0))? } else { role };
        Ok(Message { role, content })
    }

    /// A text, or a list of parts that are texts.
    fn content(&self, value: &Value, at: &str) -> Result<String> {
        let Value::Array(parts) = value else { return self.string(value, at) };
        let text = |(index, part): (usize, &Value)| match part.get("text").and_then(Value::as_str) {
            Some(text) => Ok(text.to_string()),
            None => {
                Err(self.fail(format!("{at}[{index}]"), "must be a part of the type `text`; others cannot be learnt"))
            }
        };
        parts.iter().enumerate().map(text).collect()
    }

    fn sharegpt_role(&self, from: &str, at: &str) -> Result<String> {
        const ROLES: [(&str, &str); 10] = [
            ("human", "user"),
            ("user", "user"),
            ("gpt", "assistant"),
            ("assistant", "assistant"),
            ("chatgpt", "assistant"),
            ("model", "assistant"),
            ("system", "system"),
            ("tool", "tool"),
            ("observation", "tool"),
            ("function_response", "tool"),
        ];
        let found = ROLES.iter().find(|(name, _)| *name == from);
        found.map(|(_, role)| (*role).to_string()).ok_or_else(|| {
            let names = ROLES.iter().map(|(name, _)| *name);
            let known = names.clone().collect::<Vec<_>>().join(", ");
            self.fail(at, format!("is `{from}`, which is none of {known}{}", suggestion(from, names)))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;
    use crate::data::place::At;

    fn read(record: Value, options: &ReadOptions) -> std::result::Result<Record, String> {
        let place = Place { path: Path::new("d").into(), at: At::Line(1) };
        let row = Row { place, fields: record.as_object().unwrap().clone(), of_table: false };
        let layout = layout_of(&row, options).map_err(|error| error.to_string())?;
        parse(&row, layout, options).map_err(|error| error.to_string())
    }

    pub(super) fn record(record: Value) -> Record {
        read(record, &ReadOptions::default()).unwrap()
    }

    fn error(record: Value) -> String {
        read(record, &ReadOptions::default()).unwrap_err()
    }

    pub(super) fn messages(turns: &[(&str, &str)]) -> Vec<Message> {
        turns.iter().map(|(role, content)| Message::new(role, *content)).collect()
    }

    #[test]
    fn every_layout_is_read() {
        let alpaca = json!({"instruction": "i", "input": " ", "output": "o", "system": "s"});
        let expected = |system: Option<&str>, input: &str| Record::Instruction {
            instruction: "i".into(),
            input: input.into(),
            output: "o".into(),
            system: system.map(Into::into),
        };
        assert_eq!(record(alpaca), expected(Some("s"), ""));
        assert_eq!(record(json!({"instruction": "i", "input": "x", "output": "o"})), expected(None, "x"));
        assert_eq!(record(json!({"text": "t"})), Record::Text { text: "t".into() });
        let turns = messages(&[("system", "s"), ("user", "q"), ("assistant", "a")]);
        let sharegpt = json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]);
        assert_eq!(record(json!({"conversations": sharegpt, "system": "s"})), Record::Chat { messages: turns.clone() });
        let parts = json!([{"type": "text", "text": "q"}]);
        let chat = json!([{"role": "system", "content": "s"}, {"role": "user", "content": parts},
                          {"role": "assistant", "content": "a"}]);
        assert_eq!(record(json!({"messages": chat, "system": "other"})), Record::Chat { messages: turns });
    }

    #[test]
    fn a_list_in_a_table_is_json_and_elsewhere_a_text() {
        let list = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]).to_string();
        let fields = json!({"messages": list, "chosen": null}).as_object().unwrap().clone();
        let place = Place { path: Path::new("d").into(), at: At::Line(1) };
        let mut row = Row { place, fields, of_table: true };
        let options = ReadOptions::default();
        let expected = Record::Chat { messages: messages(&[("user", "q"), ("assistant", "a")]) };
        assert_eq!(parse(&row, Layout::Messages, &options).unwrap(), expected);
        row.of_table = false;
        assert!(parse(&row, Layout::Messages, &options).unwrap_err().to_string().ends_with("it is a string"));
        let Record::Preference { chosen, .. } = record(json!({"prompt": "p", "chosen": "[{}]", "rejected": ""})) else {
            panic!()
        };
        assert_eq!(chosen, "[{}]");
    }

    #[test]
    fn fields_may_have_other_names() {
        let fields = Fields { prompt: "question".into(), completion: "answers.text".into(), ..Fields::default() };
        let options = ReadOptions { fields, ..ReadOptions::default() };
        let found = read(json!({"question": "q", "answers": {"text": "a"}, "text": "t"}), &options).unwrap();
        assert_eq!(found, Record::Completion { prompt: "q".into(), completion: "a".into(), system: None });
        let error = read(json!({"qestion": "q", "answers": {"text": "a"}}), &options).unwrap_err();
        assert_eq!(error, "d:1: the field `question` is missing; is it what the record calls `qestion`?");
    }

    #[test]
    fn integer_labels_have_names() {
        let options = ReadOptions { label_names: vec!["no".into(), "yes".into()], ..ReadOptions::default() };
        let label = |label: Value| match read(json!({"text": "t", "label": label}), &options) {
            Ok(Record::Classification { label, .. }) => label,
            other => other.unwrap_err(),
        };
        assert_eq!([label(json!(1)), label(json!("0")), label(json!("yes"))], ["yes", "no", "yes"]);
        assert_eq!(label(json!(2)), "d:1: the field `label` is 2, but label_names lists 2 labels, from 0");
        let unknown = "d:1: the field `label` is `yess`, which label_names does not list; did you mean `yes`?";
        assert_eq!(label(json!("yess")), unknown);
        assert!(label(json!(-1)).contains("which label_names does not list"));
    }

    #[test]
    fn errors_name_the_field() {
        let user = json!({"role": "user", "content": "q"});
        let errors = [
            error(json!({"promt": "p", "completion": "c"})),
            error(json!({"txt": "t", "lable": 1})),
            error(json!({"question": "t"})),
            error(json!({})),
            error(json!({"messages": [{"role": "user", "contents": "q"}]})),
            error(json!({"messages": [user, {"role": "assistant", "content": null}]})),
            error(json!({"messages": [user, {"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}]})),
            error(json!({"conversations": [{"from": "humn", "value": "q"}]})),
            error(json!({"conversations": [{"from": 3, "value": "q"}]})),
            error(json!({"messages": 3})),
            error(json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]})),
            error(json!({"chosen": [user], "rejected": [user]})),
            error(json!({"prompt": [user], "chosen": [user], "rejected": [user]})),
            error(json!({"prompt": "p", "chosen": [], "rejected": []})),
            error(json!({"prompt": "p", "chosen": 3, "rejected": "b"})),
            error(json!({"prompt": "p", "chosen": "a"})),
        ];
        insta::assert_snapshot!(errors.join("\n"), @"
        d:1: the field `prompt` is missing; is it what the record calls `promt`?
        d:1: the record is of no known layout; its fields are txt, lable; did you mean `text` by `txt`?
        d:1: the record is of no known layout; its fields are question
        d:1: the record is of no known layout; its fields are none
        d:1: the field `messages[0].content` is missing; did you mean `contents`?
        d:1: the field `messages[1].content` is null
        d:1: the field `messages[1].content` is null; calls of tools are not learnt
        d:1: the field `conversations[0].from` is `humn`, which is none of human, user, gpt, assistant, chatgpt, model, system, tool, observation, function_response; did you mean `human`?
        d:1: the field `conversations[0].from` must be a string; it is a number
        d:1: the field `messages` must be an array; it is a number
        d:1: the field `messages[0].content[0]` must be a part of the type `text`; others cannot be learnt
        d:1: the field `prompt` is missing, and the answers have no message before their last
        d:1: the field `chosen` must end with a message of the role `assistant`; the last is of `user`
        d:1: the field `chosen` holds no message
        d:1: the field `chosen` must be an array; it is a number
        d:1: the field `rejected` is missing
        ");
    }
}
