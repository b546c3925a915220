//! The prompts and lengths that are checked.

use super::*;
use crate::base::Tokenizer;
use crate::parity::Room;

/// The cases that the options ask for.
pub(super) fn cases(checkpoint: &Checkpoint, lineup: &Lineup, options: &VerifyArgs) -> Result<Vec<Case>> {
    room_cases(checkpoint.spec().into(), &|| Ok(checkpoint.tokenizer()?), lineup, options)
}

/// The same for what is known of a graph. The tokenizer is only asked for prompts of text.
pub(super) fn room_cases(
    room: Room,
    tokenizer: &dyn Fn() -> Result<Tokenizer>,
    lineup: &Lineup,
    options: &VerifyArgs,
) -> Result<Vec<Case>> {
    let random = CaseOptions { seed: options.seed, steps: options.steps, ..CaseOptions::default() };
    let mut prompts = generated_prompts(room, &random);
    let mut texts = options.prompts.clone();
    if let Some(path) = &options.prompts_file {
        texts.extend(read_prompts(path)?);
    }
    if !texts.is_empty() {
        let tokenizer = tokenizer()?;
        for prompt in &texts {
            let ids = tokenizer.encode(prompt, true)?;
            tokenizer.check_vocabulary(prompt, &ids, room.vocab)?;
            prompts.push(ids);
        }
    }
    let mut lengths = Vec::new();
    for length in &options.lengths {
        lengths.push(match (length.as_str(), length.parse()) {
            ("max", _) if room.positions == usize::MAX => {
                return Err(usage("--lengths max: no configuration beside the graph says what it is", "give a number"));
            }
            ("max", _) => room.positions,
            (_, Ok(length)) => length,
            _ => return Err(usage(format!("--lengths: `{length}` is no length"), "give numbers of tokens, or max")),
        });
    }
    if lengths.is_empty() {
        lengths.extend(length_unasked(room));
    }
    let mut all = standard_cases(&prompts, options.steps)?;
    all.extend(length_cases(room, &lengths, options.seed)?);
    let padding: Vec<Padding> = options.padding.iter().map(|side| side.padding()).collect();
    let padding = if padding.is_empty() { vec![Padding::Left, Padding::Right] } else { padding };
    all.extend(adapter_cases(&lineup.names, &prompts, options.steps, &padding, lineup.by_row)?);
    let named = named_cases(&prompts, options.steps)?;
    all.extend(named.into_iter().filter(|case| options.cases.iter().any(|name| name == case.name())));
    all.retain(|case| case.padding().is_none_or(|side| padding.contains(&side)));
    Ok(select_cases(all, &options.cases)?)
}

/// The length that is checked where none is named; none where it would be no longer than the prompts, or where nobody knows
/// how long they may be.
pub(super) fn length_unasked(room: Room) -> Option<usize> {
    if room.positions.saturating_mul(room.vocab) <= LOGITS_UNASKED {
        return Some(room.positions);
    }
    let known = Some(room.positions).filter(|positions| *positions < usize::MAX);
    let long = LONG_LOGITS.checked_div(room.vocab)?.min(LONG_TOKENS).min(known?);
    let prompts = CaseOptions::default();
    (long > prompts.lengths.iter().max()?.saturating_add(prompts.steps)).then_some(long)
}

fn read_prompts(path: &Path) -> Result<Vec<String>> {
    let text = String::from_utf8(crate::files::read(path)?)
        .map_err(|e| usage(format!("{} is not UTF-8: {e}", path.display()), "save it as UTF-8"))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    if path.extension().is_none_or(|extension| extension != "jsonl") {
        return Ok(lines.map(|(_, line)| line.to_owned()).collect());
    }
    let prompt = |(number, line): (usize, &str)| {
        let value: Option<serde_json::Value> = serde_json::from_str(line).ok();
        let value = value.as_ref().map(|value| value.get("prompt").or(value.get("text")).unwrap_or(value));
        value.and_then(|value| value.as_str()).map(ToOwned::to_owned).ok_or_else(|| {
            let place = format!("{}:{}", path.display(), number.saturating_add(1));
            usage(format!("{place} holds no prompt"), "write a JSON string, or an object with `prompt` or `text`")
        })
    };
    lines.map(prompt).collect()
}
