//! What is run: prompts as batches, padded on either side, with or without cached steps after them.

use ndarray::Array2;
use rand::{RngExt, SeedableRng};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Error, Result};
use crate::base::DecoderSpec;

/// On which side shorter rows are filled up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Padding {
    /// Before the prompt, so that all rows end together.
    Left,
    /// After the prompt.
    Right,
}

/// A batch of prompts, run at once and then continued token by token with the cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    name: String,
    /// `[batch, seq]`.
    ids: Array2<i64>,
    /// `[batch, seq]`, 1 where a token is real.
    mask: Array2<i64>,
    steps: usize,
    /// Columns of each call of the prefill but the last; none for all at once.
    chunk: Option<usize>,
    /// By row, the number of the model that it is for.
    models: Vec<usize>,
}

/// What prompts must fit: a model's tokens and positions, or a graph's as far as they are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Tokens.
    pub vocab: usize,
    /// Positions.
    pub positions: usize,
}

impl From<&DecoderSpec> for Room {
    fn from(spec: &DecoderSpec) -> Self {
        Self { vocab: spec.vocab_size, positions: spec.max_positions }
    }
}

/// How [`generated_prompts`] makes prompts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaseOptions {
    /// Seed of the token ids.
    pub seed: u64,
    /// Tokens of each prompt.
    pub lengths: Vec<usize>,
    /// Cached steps after the prompts.
    pub steps: usize,
}

impl Default for CaseOptions {
    fn default() -> Self {
        Self { seed: 0, lengths: vec![24, 9, 16], steps: 8 }
    }
}

impl Case {
    /// A batch of `prompts`, each filled up to the longest one on the given side, followed by `steps` cached steps. Rows of
    /// equal length get one column of padding too, for otherwise there is nothing to see; one row in a case of its own
    /// gets none with [`row`](Self::row). The padding repeats a real token, so that a graph that looks at it tells.
    ///
    /// # Errors
    /// When there is no prompt or one of them is empty.
    pub fn batch(name: &str, prompts: &[Vec<u32>], padding: Padding, steps: usize) -> Result<Self> {
        let lengths = || prompts.iter().map(Vec::len);
        let (Some(shortest), Some(longest)) = (lengths().min(), lengths().max()) else {
            return Err(Error::Case { case: name.into(), why: "there is no prompt".into() });
        };
        let width = longest.saturating_add(usize::from(shortest == longest));
        Self::padded(name, prompts, width, padding, steps)
    }

    /// One prompt without padding, followed by `steps` cached steps.
    ///
    /// # Errors
    /// When the prompt is empty.
    pub fn row(name: &str, prompt: &[u32], steps: usize) -> Result<Self> {
        Self::padded(name, &[prompt.to_vec()], prompt.len(), Padding::Left, steps)
    }

    /// As many rows as prompts, each cut to the shortest, and so without padding, followed by `steps` cached steps.
    ///
    /// # Errors
    /// When there is no prompt or one of them is empty.
    pub fn even(name: &str, prompts: &[Vec<u32>], steps: usize) -> Result<Self> {
        let shortest = prompts.iter().map(Vec::len).min().unwrap_or(0);
        let cut: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.iter().copied().take(shortest).collect()).collect();
        Self::padded(name, &cut, shortest, Padding::Left, steps)
    }

    fn padded(name: &str, prompts: &[Vec<u32>], width: usize, padding: Padding, steps: usize) -> Result<Self> {
        let (mut ids, mut mask) = (Vec::new(), Vec::new());
        for (row, prompt) in prompts.iter().enumerate() {
            let Some(filler) = prompt.first() else {
                return Err(Error::Case { case: name.into(), why: format!("prompt {row} is empty") });
            };
            let tokens = prompt.iter().map(|id| (i64::from(*id), 1));
            let filling = std::iter::repeat_n((i64::from(*filler), 0), width.saturating_sub(prompt.len()));
            let row: Vec<(i64, i64)> = match padding {
                Padding::Left => filling.chain(tokens).collect(),
                Padding::Right => tokens.chain(filling).collect(),
            };
            ids.extend(row.iter().map(|(id, _)| *id));
            mask.extend(row.iter().map(|(_, real)| *real));
        }
        let shape = (prompts.len(), width);
        let array = |values| {
            Array2::from_shape_vec(shape, values)
                .map_err(|error| Error::Case { case: name.into(), why: error.to_string() })
        };
        Ok(Self {
            name: name.into(),
            ids: array(ids)?,
            mask: array(mask)?,
            steps,
            chunk: None,
            models: vec![0; prompts.len()],
        })
    }

    /// The same with the prompts fed in pieces of `columns`, each after the cache of those before it.
    pub fn chunked(mut self, columns: usize) -> Self {
        self.chunk = Some(columns.max(1));
        self
    }

    /// The same for other models than the first: row by row these, again from the beginning when there are more rows.
    pub fn for_models(mut self, models: &[usize]) -> Self {
        self.models = models.iter().copied().cycle().take(self.ids.nrows()).collect();
        self
    }

    /// By row, the number of the model that it is for.
    pub fn models(&self) -> &[usize] {
        &self.models
    }

    /// Columns that each call of the prefill feeds, but for the last, which may feed fewer.
    pub fn chunk(&self) -> usize {
        self.chunk.unwrap_or(self.ids.ncols())
    }

    /// On which side rows have padding.
    pub fn padding(&self) -> Option<Padding> {
        let ends = |end: Option<usize>| end.is_some_and(|end| self.mask.column(end).iter().any(|real| *real == 0));
        match (ends((self.mask.ncols() > 0).then_some(0)), ends(self.mask.ncols().checked_sub(1))) {
            (true, _) => Some(Padding::Left),
            (_, true) => Some(Padding::Right),
            _ => None,
        }
    }

    /// The case's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Token ids, `[batch, seq]`.
    pub fn ids(&self) -> &Array2<i64> {
        &self.ids
    }

    /// 1 where a token is real, 0 where it is padding, `[batch, seq]`.
    pub fn mask(&self) -> &Array2<i64> {
        &self.mask
    }

    /// Cached steps after the prompts.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// Whether the model has enough positions for the case.
    pub(super) fn check_fits(&self, spec: &DecoderSpec) -> Result<()> {
        let longest = self.mask.rows().into_iter().map(|row| row.iter().filter(|real| **real == 1).count()).max();
        let needed = longest.unwrap_or(0).saturating_add(self.steps);
        if needed <= spec.max_positions {
            return Ok(());
        }
        let why = format!("it needs {needed} positions and the model has {}", spec.max_positions);
        Err(Error::Case { case: self.name.clone(), why })
    }
}

/// Prompts of random tokens, the same for the same options. A model with few positions gets shorter ones.
pub fn generated_prompts(room: impl Into<Room>, options: &CaseOptions) -> Vec<Vec<u32>> {
    let Room { vocab, positions } = room.into();
    let mut random = rand_pcg::Pcg64Mcg::seed_from_u64(options.seed);
    let room = positions.saturating_sub(options.steps).max(1);
    let vocab = u32::try_from(vocab).unwrap_or(u32::MAX).max(1);
    let prompt = |length: &usize| (0..(*length).min(room)).map(|_| random.random_range(0..vocab)).collect();
    options.lengths.iter().map(prompt).collect()
}

/// The cases that every graph must pass: one token; a single row; all prompts as a batch with padding on the left and on the
/// right; the longest prompt, one token, and the batch, padded and not, each continued by `steps` cached steps; the longest
/// prompt fed in pieces and then continued.
///
/// # Errors
/// When there is no prompt or one of them is empty.
pub fn standard_cases(prompts: &[Vec<u32>], steps: usize) -> Result<Vec<Case>> {
    let longest = prompts.iter().max_by_key(|prompt| prompt.len()).map(Vec::as_slice).unwrap_or_default();
    let one = longest.get(..1).unwrap_or_default();
    // Three pieces and a shorter one, for a prompt of ten tokens or more.
    let piece = (longest.len() / 3).max(1);
    Ok(vec![
        Case::row("single_row", longest, 0)?,
        Case::row("one_token", one, 0)?,
        Case::batch("left_padding", prompts, Padding::Left, 0)?,
        Case::batch("right_padding", prompts, Padding::Right, 0)?,
        Case::row("cached_decode", longest, steps)?,
        Case::row("cached_decode_from_one_token", one, steps)?,
        Case::batch("cached_decode_left_padding", prompts, Padding::Left, steps)?,
        Case::even("cached_decode_batch", prompts, steps)?,
        Case::row("chunked_prefill", longest, steps)?.chunked(piece),
    ])
}

/// Cases for those who name them: the batch fed in pieces. ONNX Runtime's GroupQueryAttention refuses several rows of several
/// tokens after a past, and no server that runs it feeds them.
///
/// # Errors
/// When there is no prompt or one of them is empty.
pub fn named_cases(prompts: &[Vec<u32>], steps: usize) -> Result<Vec<Case>> {
    let lengths = || prompts.iter().map(Vec::len);
    let (longest, shortest) = (lengths().max().unwrap_or(0), lengths().min().unwrap_or(0));
    // The first piece holds a token of every row: one of padding alone is nothing that a server feeds.
    let piece = (longest / 3).max(longest.saturating_sub(shortest).max(1).saturating_add(1));
    Ok(vec![Case::batch("chunked_prefill_left_padding", prompts, Padding::Left, steps)?.chunked(piece)])
}

/// Random rows of these lengths, without padding, each a case `length_N`.
///
/// # Errors
/// When a length is zero.
pub fn length_cases(room: impl Into<Room>, lengths: &[usize], seed: u64) -> Result<Vec<Case>> {
    let room = room.into();
    let case = |length: &usize| {
        let options = CaseOptions { seed, lengths: vec![*length], steps: 0 };
        if *length > room.positions {
            let why = format!("it needs {length} positions and the model has {}", room.positions);
            return Err(Error::Case { case: format!("length_{length}"), why });
        }
        Case::row(&format!("length_{length}"), &generated_prompts(room, &options).concat(), 0)
    };
    lengths.iter().map(case).collect()
}

/// Cases for a graph that switches between models, `names`: every other one after the standard cases, which the first one runs,
/// and then the first one again, so that all are swapped in one session. With `by_row` also all of them in one batch, padded on
/// each of these sides.
///
/// # Errors
/// When there is no prompt or one of them is empty.
pub fn adapter_cases(
    names: &[String],
    prompts: &[Vec<u32>],
    steps: usize,
    padding: &[Padding],
    by_row: bool,
) -> Result<Vec<Case>> {
    let numbers: Vec<usize> = (0..names.len()).collect();
    let left = padding.contains(&Padding::Left);
    let longest = prompts.iter().max_by_key(|prompt| prompt.len()).cloned().unwrap_or_default();
    let alone = |number: usize, name: &str| {
        let name = format!("adapter_{name}");
        let case =
            if left { Case::batch(&name, prompts, Padding::Left, steps) } else { Case::row(&name, &longest, steps) };
        Ok(case?.for_models(&[number]))
    };
    let [first, others @ ..] = names else { return Ok(Vec::new()) };
    let others = others.iter().zip(1..).map(|(name, number)| alone(number, name));
    let mut cases = others.collect::<Result<Vec<_>>>()?;
    if cases.is_empty() {
        return Ok(cases);
    }
    cases.push(alone(0, &format!("{first}_again"))?);
    if by_row {
        let rows: Vec<Vec<u32>> = prompts.iter().cloned().cycle().take(prompts.len().max(names.len())).collect();
        let backwards: Vec<usize> = numbers.iter().rev().copied().collect();
        let mixed = |side, name, steps| Case::batch(name, &rows, side, steps);
        if left {
            cases.push(mixed(Padding::Left, "mixed_adapters", steps)?.for_models(&numbers));
        }
        if padding.contains(&Padding::Right) {
            cases.push(mixed(Padding::Right, "mixed_adapters_right_padding", 0)?.for_models(&backwards));
        }
    }
    Ok(cases)
}

/// The cases of these names, in the order of `cases`; all where no name is given.
///
/// # Errors
/// When there is no case of a name.
pub fn select_cases(cases: Vec<Case>, names: &[String]) -> Result<Vec<Case>> {
    if let Some(name) = names.iter().find(|name| cases.iter().all(|case| case.name != **name)) {
        let known: Vec<&str> = cases.iter().map(Case::name).collect();
        let why = format!("there is no such case, only {}", known.join(", "));
        return Err(Error::Case { case: name.clone(), why });
    }
    Ok(cases.into_iter().filter(|case| names.is_empty() || names.contains(&case.name)).collect())
}

#[cfg(test)]
mod tests {
    use ndarray::arr2;

    use super::*;
    use crate::parity::testing;

    #[test]
    fn rows_are_filled_up_on_the_named_side() {
        let prompts = [vec![5, 6, 7], vec![8]];
        let left = Case::batch("l", &prompts, Padding::Left, 2).unwrap();
        assert_eq!((left.ids(), left.mask()), (&arr2(&[[5, 6, 7], [8, 8, 8]]), &arr2(&[[1, 1, 1], [0, 0, 1]])));
        let right = Case::batch("r", &prompts, Padding::Right, 0).unwrap();
        assert_eq!((right.ids(), right.mask()), (&arr2(&[[5, 6, 7], [8, 8, 8]]), &arr2(&[[1, 1, 1], [1, 0, 0]])));
    }

    #[test]
    fn prompts_of_one_length_are_padded_nevertheless() {
        let left = Case::batch("l", &[vec![5], vec![6]], Padding::Left, 0).unwrap();
        assert_eq!(left.mask(), &arr2(&[[0, 1], [0, 1]]));
        assert_eq!(Case::row("s", &[5, 6], 0).unwrap().mask(), &arr2(&[[1, 1]]));
        let even = Case::even("e", &[vec![5, 6, 7], vec![8, 9]], 1).unwrap();
        assert_eq!(
            (even.ids(), even.mask(), even.padding()),
            (&arr2(&[[5, 6], [8, 9]]), &arr2(&[[1, 1], [1, 1]]), None)
        );
    }

    #[test]
    fn cases_are_chosen_by_name_and_lengths_fit_the_model() {
        let spec = testing::tiny_spec();
        let cases = length_cases(&spec, &[1, 7, spec.max_positions], 3).unwrap();
        let widths: Vec<usize> = cases.iter().map(|case| case.ids().ncols()).collect();
        assert_eq!(widths, [1, 7, spec.max_positions]);
        assert!(matches!(length_cases(&spec, &[spec.max_positions + 1], 3), Err(Error::Case { .. })));
        let chosen = select_cases(cases.clone(), &["length_7".into()]).unwrap();
        assert_eq!(chosen, cases[1..2]);
        let error = select_cases(cases, &["length_8".into()]).unwrap_err().to_string();
        assert!(error.contains("`length_8`") && error.contains("only length_1, length_7, length_64"), "{error}");
    }

    #[test]
    fn empty_prompts_are_refused() {
        for prompts in [vec![], vec![vec![]], vec![vec![1], vec![]]] {
            assert!(matches!(standard_cases(&prompts, 1), Err(Error::Case { .. })), "{prompts:?}");
        }
    }

    #[test]
    fn generated_prompts_depend_on_the_seed_alone_and_fit_the_model() {
        let mut spec = testing::tiny_spec();
        let options = CaseOptions::default();
        let prompts = generated_prompts(&spec, &options);
        assert_eq!(prompts, generated_prompts(Room::from(&spec), &options));
        assert_ne!(prompts, generated_prompts(&spec, &CaseOptions { seed: 1, ..options.clone() }));
        assert_eq!(prompts.iter().map(Vec::len).collect::<Vec<_>>(), options.lengths);
        assert!(prompts.iter().flatten().all(|id| (*id as usize) < spec.vocab_size));
        spec.max_positions = 12;
        let prompts = generated_prompts(&spec, &options);
        for case in standard_cases(&prompts, options.steps).unwrap() {
            case.check_fits(&spec).unwrap();
        }
        let long = Case::row("long", &[1, 2, 3, 4, 5], 8).unwrap();
        let message = long.check_fits(&spec).unwrap_err().to_string();
        assert!(message.contains("13 positions and the model has 12"), "{message}");
    }
}
