//! Chat templates: a conversation as the text that an instruction-tuned model was trained on.
//!
//! Templates are Jinja sources that transformers runs; this gives them the same environment.

use std::collections::BTreeMap;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value};
use serde::{Deserialize, Serialize};

use super::{Error, Result};

const NAME: &str = "chat_template";
/// Steps that one rendering may take, so that a template from elsewhere cannot run forever. A long conversation takes
/// some thousands.
const FUEL: u64 = 10_000_000;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: &str, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A compiled chat template.
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
    special_tokens: BTreeMap<&'static str, String>,
}

impl ChatTemplate {
    /// Compiles a template; the tokens are what it sees as `bos_token` and `eos_token`.
    ///
    /// # Errors
    /// When the source does not parse.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(syntax().map_err(|error| Error::TemplateSyntax { reason: error.to_string() })?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: &str| strftime(now(), format));
        environment.add_filter("tojson", to_json);
        environment
            .add_template_owned(NAME, source.to_string())
            .map_err(|error| Error::TemplateSyntax { reason: error.to_string() })?;
        let special_tokens = [("bos_token", bos_token), ("eos_token", eos_token)]
            .into_iter()
            .filter_map(|(name, token)| Some((name, token?.to_string())))
            .collect();
        Ok(Self { source: source.into(), environment, special_tokens })
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The conversation as text. With `add_generation_prompt` it ends where the assistant's answer begins.
    ///
    /// # Errors
    /// When the template raises an exception, or fails on the messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let mut context: BTreeMap<&str, Value> =
            self.special_tokens.iter().map(|(name, token)| (*name, Value::from(token.as_str()))).collect();
        context.insert("messages", messages.iter().map(turn).collect::<Value>());
        context.insert("add_generation_prompt", Value::from(add_generation_prompt));
        // transformers passes these as None; a template asks `tools is not none`, which an undefined value would pass.
        context.insert("tools", Value::from(()));
        context.insert("documents", Value::from(()));
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context))
            .map_err(|error| Error::TemplateRender { reason: root_cause(&error) })
    }
}

fn turn(message: &Message) -> Value {
    Value::from_pairs([("role", message.role.as_str()), ("content", message.content.as_str())])
}

/// White space is handled as transformers handles it.
fn syntax() -> std::result::Result<SyntaxConfig, minijinja::Error> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

fn root_cause(error: &minijinja::Error) -> String {
    match (error.kind(), error.detail()) {
        (ErrorKind::InvalidOperation, Some(detail)) => detail.into(),
        _ => error.to_string(),
    }
}

fn raise_exception(message: &str) -> std::result::Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_string()))
}

/// JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it: minijinja's own filter escapes HTML.
fn to_json(value: &Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let mut out = Vec::new();
    let written = match indent {
        Some(width) => {
            let indent = " ".repeat(width.min(16));
            let formatter = serde_json::ser::PrettyFormatter::with_indent(indent.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut out, PythonFormatter)),
    };
    let invalid = |error: String| minijinja::Error::new(ErrorKind::BadSerialization, error);
    written.map_err(|error| invalid(error.to_string()))?;
    String::from_utf8(out).map_err(|error| invalid(error.to_string()))
}

/// Python's separators, `", "` and `": "`.
struct PythonFormatter;

impl PythonFormatter {
    fn separate<W: ?Sized + std::io::Write>(writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }
}

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        Self::separate(writer, first)
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        Self::separate(writer, first)
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

/// Seconds since 1970, UTC. `SOURCE_DATE_EPOCH` fixes it, so that a run can be repeated on another day.
fn now() -> u64 {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|seconds| seconds.parse().ok());
    fixed.unwrap_or_else(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        since.map_or(0, |since| since.as_secs())
    })
}

/// The directives that chat templates use: dates, and the time of day.
fn strftime(seconds: u64, format: &str) -> std::result::Result<String, minijinja::Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const WEEKDAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let days = seconds / 86_400;
    let (year, month, day) = civil_from_days(days);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let month_name = MONTHS.get(month.saturating_sub(1) as usize).copied().unwrap_or_default();
    let weekday = WEEKDAYS.get((days % 7) as usize).copied().unwrap_or_default();
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        match characters.next() {
            Some('Y') => out += &format!("{year:04}"),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out.extend(month_name.chars().take(3)),
            Some('A') => out += weekday,
            Some('a') => out.extend(weekday.chars().take(3)),
            Some('H') => out += &format!("{hour:02}"),
            Some('M') => out += &format!("{minute:02}"),
            Some('S') => out += &format!("{second:02}"),
            Some('%') => out.push('%'),
            other => {
                let directive: String = other.into_iter().collect();
                let reason = format!("strftime_now does not know the directive `%{directive}`");
                return Err(minijinja::Error::new(ErrorKind::InvalidOperation, reason));
            }
        }
    }
    Ok(out)
}

/// Year, month and day of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
///
/// Years are counted from March, so that the leap day comes last; 146,097 days are 400 years.
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                          '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' \
                          }}{% endif %}";

    fn render(source: &str) -> Result<String> {
        let messages = [Message::new("user", "é <b>\"x\"</b>")];
        ChatTemplate::new(source, Some("<s>"), None)?.render(&messages, true)
    }

    #[test]
    fn renders_turns() {
        let template = ChatTemplate::new(CHATML, None, None).unwrap();
        let messages = [Message::new("user", "Hi"), Message::new("assistant", "Yes?")];
        let turn = "<|im_start|>user\nHi<|im_end|>\n";
        assert_eq!(template.render(&messages[..1], true).unwrap(), format!("{turn}<|im_start|>assistant\n"));
        let both = format!("{turn}<|im_start|>assistant\nYes?<|im_end|>\n");
        assert_eq!(template.render(&messages, false).unwrap(), both);
    }

    /// What jinja2 gives with `trim_blocks` and `lstrip_blocks`: a block's line leaves nothing behind.
    #[test]
    fn blocks_leave_no_white_space() {
        assert_eq!(render("a\n  {% if true %}\nb\n  {% endif %}\nc").unwrap(), "a\nb\nc");
    }

    #[test]
    fn offers_what_transformers_offers() {
        assert_eq!(render("{{ bos_token }}|{{ eos_token }}|").unwrap(), "<s>||");
        assert_eq!(render("{{ messages[0].content.strip().split(' ')[0].upper() }}").unwrap(), "É");
        assert_eq!(render("{% if tools is not none %}tools{% endif %}").unwrap(), "");
        let json = "{\"role\": \"user\", \"content\": \"é <b>\\\"x\\\"</b>\"}";
        assert_eq!(render("{{ messages[0] | tojson }}").unwrap(), json);
        assert_eq!(render("{{ [1] | tojson(indent=2) }}").unwrap(), "[\n  1\n]");
        assert_eq!(
            render("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}").unwrap(),
            "01"
        );
    }

    #[test]
    fn a_refusal_is_an_error_with_the_templates_words() {
        let error = render("{{ raise_exception('roles must alternate') }}").unwrap_err();
        assert_eq!(error.to_string(), "the chat template refused the conversation: roles must alternate");
        let endless = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(matches!(render(endless), Err(Error::TemplateRender { .. })));
        assert!(matches!(render("{% if %}"), Err(Error::TemplateSyntax { .. })));
        assert!(matches!(render("{{ messages[9].content.strip() }}"), Err(Error::TemplateRender { .. })));
    }

    /// Dates of the POSIX clock that can be looked up: `date -u -d @1709251199`.
    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(strftime(0, "%A %d %B %Y %H:%M:%S").unwrap(), "Thursday 01 January 1970 00:00:00");
        assert_eq!(strftime(1_709_251_199, "%a %d %b %Y %H:%M:%S %%").unwrap(), "Thu 29 Feb 2024 23:59:59 %");
        assert_eq!(strftime(4_107_542_400, "%Y-%m-%d").unwrap(), "2100-03-01");
        assert!(strftime(0, "%Q").is_err());
    }
}
