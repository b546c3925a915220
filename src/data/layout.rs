//! What a record looks like in its file: layouts, and the names of their fields.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// How a record's fields say what is learnt; the records of a run have one layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `{"text", "label"}`: a text and its class.
    Classification,
    /// `{"prompt", "completion"}`: a text and how it goes on.
    Completion,
    /// `{"text"}`: a text, all of which is learnt.
    Text,
    /// `{"instruction", "input", "output"}`: an instruction, its input or none, and the answer.
    Alpaca,
    /// `{"messages": [{"role", "content"}]}`: a conversation.
    Messages,
    /// `{"conversations": [{"from", "value"}]}`: a conversation between `human` and `gpt`.
    Sharegpt,
    /// `{"prompt", "chosen", "rejected"}`: a better and a worse answer. Answers are texts or lists of messages; without a
    /// prompt both are whole conversations.
    Preference,
}

/// The names of a record's fields; `answer.text` is the field `text` of the object `answer`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Fields {
    /// The text of classification and text records.
    pub text: String,
    /// The class.
    pub label: String,
    /// The prompt of completion and preference records.
    pub prompt: String,
    /// The completion.
    pub completion: String,
    /// The instruction of alpaca records.
    pub instruction: String,
    /// What the instruction is about; may be absent or empty.
    pub input: String,
    /// The answer to the instruction.
    pub output: String,
    /// A record's own system prompt; may be absent or empty.
    pub system: String,
    /// The conversation of messages records.
    pub messages: String,
    /// The conversation of sharegpt records.
    pub conversations: String,
    /// A message's role.
    pub role: String,
    /// A message's text.
    pub content: String,
    /// A message's role where it has no `role`.
    pub from: String,
    /// A message's text where it has no `role`.
    pub value: String,
    /// The better answer.
    pub chosen: String,
    /// The worse answer.
    pub rejected: String,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            text: "text".into(),
            label: "label".into(),
            prompt: "prompt".into(),
            completion: "completion".into(),
            instruction: "instruction".into(),
            input: "input".into(),
            output: "output".into(),
            system: "system".into(),
            messages: "messages".into(),
            conversations: "conversations".into(),
            role: "role".into(),
            content: "content".into(),
            from: "from".into(),
            value: "value".into(),
            chosen: "chosen".into(),
            rejected: "rejected".into(),
        }
    }
}

impl Layout {
    /// In the order in which a record's fields are asked: the first layout wins that any field of speaks for it.
    const ALL: [Self; 7] = [
        Self::Preference,
        Self::Messages,
        Self::Sharegpt,
        Self::Alpaca,
        Self::Completion,
        Self::Classification,
        Self::Text,
    ];

    /// The shapes of all layouts, for help texts.
    pub(super) const SHAPES: &str = "{\"text\", \"label\"}, {\"prompt\", \"completion\"}, {\"text\"}, \
                                     {\"instruction\", \"input\", \"output\"}, {\"messages\": [{\"role\", \
                                     \"content\"}, …]}, {\"conversations\": [{\"from\", \"value\"}, …]} or \
                                     {\"prompt\", \"chosen\", \"rejected\"}";

    /// What a record of this layout looks like.
    pub fn shape(self) -> &'static str {
        match self {
            Self::Classification => "{\"text\": \"…\", \"label\": \"…\"}",
            Self::Completion => "{\"prompt\": \"…\", \"completion\": \"…\"}",
            Self::Text => "{\"text\": \"…\"}",
            Self::Alpaca => "{\"instruction\": \"…\", \"input\": \"…\", \"output\": \"…\"}",
            Self::Messages => {
                "{\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, {\"role\": \"assistant\", \"content\": \"…\"}]}"
            }
            Self::Sharegpt => {
                "{\"conversations\": [{\"from\": \"human\", \"value\": \"…\"}, {\"from\": \"gpt\", \"value\": \"…\"}]}"
            }
            Self::Preference => "{\"prompt\": \"…\", \"chosen\": \"…\", \"rejected\": \"…\"}",
        }
    }

    /// The fields that a record cannot do without.
    pub(super) fn needed(self, fields: &Fields) -> Vec<&str> {
        match self {
            Self::Classification => vec![&fields.text, &fields.label],
            Self::Completion => vec![&fields.prompt, &fields.completion],
            Self::Text => vec![&fields.text],
            Self::Alpaca => vec![&fields.instruction, &fields.output],
            Self::Messages => vec![&fields.messages],
            Self::Sharegpt => vec![&fields.conversations],
            Self::Preference => vec![&fields.chosen, &fields.rejected],
        }
    }

    /// The fields that no layout before this one has.
    fn telling(self, fields: &Fields) -> Vec<&str> {
        match self {
            Self::Alpaca => vec![&fields.instruction],
            Self::Classification => vec![&fields.label],
            other => other.needed(fields),
        }
    }

    /// The first layout that any telling field speaks for.
    pub(super) fn detect(record: &Map<String, Value>, fields: &Fields) -> Option<Self> {
        Self::ALL.into_iter().find(|layout| layout.telling(fields).iter().any(|name| lookup(record, name).is_some()))
    }

    /// The names that any layout needs.
    pub(super) fn known(fields: &Fields) -> Vec<&str> {
        Self::ALL.into_iter().flat_map(|layout| layout.needed(fields)).collect()
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Classification => "classification",
            Self::Completion => "completion",
            Self::Text => "text",
            Self::Alpaca => "alpaca",
            Self::Messages => "messages",
            Self::Sharegpt => "sharegpt",
            Self::Preference => "preference",
        })
    }
}

impl std::str::FromStr for Layout {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names = Self::ALL.map(|layout| layout.to_string());
        let found = Self::ALL.into_iter().zip(&names).find(|(_, name)| *name == text);
        found.map(|(layout, _)| layout).ok_or_else(|| {
            let meant = super::place::suggestion(text, names.iter().map(String::as_str));
            format!("is none of {}{meant}", names.join(", "))
        })
    }
}

/// A field by its name, or by the dotted path to it; `null` is as good as absent.
pub(super) fn lookup<'r>(record: &'r Map<String, Value>, name: &str) -> Option<&'r Value> {
    let found = record.get(name).or_else(|| {
        let mut parts = name.split('.');
        let first = record.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.as_object()?.get(part))
    });
    found.filter(|value| !value.is_null())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn detect(record: Value) -> Option<Layout> {
        Layout::detect(record.as_object().unwrap(), &Fields::default())
    }

    #[test]
    fn the_fields_tell_the_layout() {
        assert_eq!(detect(json!({"text": "a", "label": 1})), Some(Layout::Classification));
        assert_eq!(detect(json!({"text": "a", "label": null})), Some(Layout::Text));
        assert_eq!(detect(json!({"prompt": "a", "completion": "b", "text": "ab"})), Some(Layout::Completion));
        assert_eq!(detect(json!({"instruction": "a", "input": "", "output": "b", "text": "ab"})), Some(Layout::Alpaca));
        assert_eq!(detect(json!({"prompt": "a", "messages": []})), Some(Layout::Messages));
        assert_eq!(detect(json!({"conversations": []})), Some(Layout::Sharegpt));
        assert_eq!(
            detect(json!({"prompt": "a", "messages": [], "chosen": "b", "rejected": "c"})),
            Some(Layout::Preference)
        );
        assert_eq!(detect(json!({"input": "a", "output": "b"})), None);
        assert!("messges".parse::<Layout>().unwrap_err().contains("did you mean `messages`?"));
        assert_eq!("sharegpt".parse(), Ok(Layout::Sharegpt));
    }

    #[test]
    fn a_dotted_name_is_a_path() {
        let record = json!({"a": {"b": {"c": 1}, "d": null}, "a.b": 2});
        let at = |name: &str| lookup(record.as_object().unwrap(), name);
        assert_eq!(at("a.b.c"), Some(&json!(1)));
        assert_eq!(at("a.b"), Some(&json!(2)), "a field of that very name comes first");
        assert_eq!((at("a.d"), at("a.b.c.d"), at(""), at("."), at("a.")), (None, None, None, None, None));
    }
}
