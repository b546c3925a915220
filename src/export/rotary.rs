//! Rotary position embedding: angles for every dialect, and the rotation in standard operators.
//!
//! Angles are computed in the graph from `position_ids`, so that there is no table that a position could be beyond, and
//! frequencies may depend on the length of the sequence. An operator that counts positions by itself is given a table of all.

use super::Result;
use super::writer::GraphWriter;
use crate::base::{LongContext, Rotary};
use crate::onnx::{DataType, NodeDef};

/// Cosine and sine of position · frequency, by name.
#[derive(Clone, Debug)]
pub(super) struct Angles {
    pub(super) cos: String,
    pub(super) sin: String,
}

/// One column of [`Angles`].
#[derive(Clone, Copy, Debug)]
struct Column {
    /// Which pair; none for an element that is not turned.
    pair: Option<usize>,
    /// Of the sine.
    sign: f32,
}

impl Angles {
    /// One column a pair, `[batch · sequence, dim / 2]`.
    pub(super) fn by_pair(graph: &mut GraphWriter, index: usize, rotary: &Rotary) -> Self {
        let columns: Vec<Column> = (0..rotary.dim / 2).map(|pair| Column { pair: Some(pair), sign: 1.0 }).collect();
        let positions = graph.reshape(&at(index, "Reshape_positions"), POSITIONS, &[-1, 1]);
        Self::new(graph, index, rotary, (&positions, POSITIONS), &columns)
    }

    /// One row a position from 0 on, one column a pair, in the graph's type: `[max_positions + 1024, dim / 2]`, written out, or, where
    /// frequencies depend on the length, `[total, dim / 2]`, computed. `total` and `last` are int tensors: past and new tokens
    /// together, without dimensions, and the last position of each row.
    pub(super) fn by_position(
        graph: &mut GraphWriter,
        index: usize,
        rotary: &Rotary,
        (total, last): (&str, &str),
    ) -> Result<Self> {
        let columns: Vec<Column> = (0..rotary.dim / 2).map(|pair| Column { pair: Some(pair), sign: 1.0 }).collect();
        if rotary.long != LongContext::Same {
            let (zero, one) = (graph.integer(0), graph.integer(1));
            let positions = graph.node("Range", &at(index, "Range_positions"), &[&zero, total, &one]);
            let positions = graph.unsqueeze(&at(index, "Unsqueeze_positions"), &positions, &[1]);
            return Ok(Self::new(graph, index, rotary, (&positions, last), &columns));
        }
        let factor = rotary.attention_factor as f32;
        let angles = |position: usize| rotary.inv_freq.iter().map(move |frequency| position as f32 * frequency);
        let positions = graph.spec().max_positions.saturating_add(ROOM_FOR_A_PREFIX);
        let mut table = |name: &str, of: fn(f32) -> f32| {
            let values = (0..positions).flat_map(|position| angles(position).map(|angle| of(angle) * factor)).collect();
            graph.matrix(&at(index, name), rotary.dim / 2, values)
        };
        Ok(Self { cos: table("cos_cache", f32::cos)?, sin: table("sin_cache", f32::sin)? })
    }

    /// One column an element of a head, `[batch, 1, sequence, head_dim]`, for [`rotate`]: sines have the sign with which
    /// they meet the pair's other element; elements that are not turned have cosine 1 and sine 0.
    pub(super) fn by_element(graph: &mut GraphWriter, index: usize, rotary: &Rotary) -> Self {
        let half = rotary.dim / 2;
        let column = |element: usize| {
            let (pair, second) = if rotary.interleaved {
                (element / 2, element % 2 == 1)
            } else {
                (element % half.max(1), element >= half)
            };
            Column { pair: (element < rotary.dim).then_some(pair), sign: if second { 1.0 } else { -1.0 } }
        };
        let columns: Vec<Column> = (0..graph.spec().attention.head_dim).map(column).collect();
        let positions = graph.unsqueeze(&at(index, "Unsqueeze_positions"), POSITIONS, &[1, 3]);
        Self::new(graph, index, rotary, (&positions, POSITIONS), &columns)
    }

    /// Products in float32, as transformers computes them, then in the graph's type. The last of all positions is the largest of `last`.
    fn new(
        graph: &mut GraphWriter,
        index: usize,
        rotary: &Rotary,
        (positions, last): (&str, &str),
        columns: &[Column],
    ) -> Self {
        let at = |name: &str| at(index, name);
        let positions = graph.cast_always(&at("Cast_positions"), positions, DataType::Float);
        let frequencies = frequencies(graph, index, rotary, last, columns);
        let angles = graph.node("Mul", &at("Mul"), &[&positions, &frequencies]);
        let factor = rotary.attention_factor as f32;
        let cosines = columns.iter().map(|c| if c.pair.is_some() { factor } else { 1.0 }).collect();
        let sines = columns.iter().map(|c| c.sign * factor).collect();
        let mut table = |op: &str, factors: Vec<f32>| {
            let mut table = graph.node(op, &at(op), &[&angles]);
            if factors.iter().any(|factor| *factor != 1.0) {
                let factors = graph.floats(&at(&format!("factors_{op}")), &factors);
                table = graph.node("Mul", &at(&format!("Mul_{op}")), &[&table, &factors]);
            }
            let float = graph.data_type();
            graph.cast(&at(&format!("Cast_{op}")), &table, float)
        };
        Self { cos: table("Cos", cosines), sin: table("Sin", sines) }
    }
}

const POSITIONS: &str = "position_ids";

/// Rows of a table beyond the model's positions, for the virtual tokens of prefix tuning.
const ROOM_FOR_A_PREFIX: usize = 1024;

fn at(index: usize, name: &str) -> String {
    format!("/model/rotary_emb.{index}/{name}")
}

/// float32 `[columns]`, zero where nothing is turned. Where they depend on the length:
/// ```text
/// last ─ Cast ─ ReduceMax ─ Add 1 ─ Greater original ─────────┐
///                                     (others of this length) ┴ Where
/// ```
fn frequencies(graph: &mut GraphWriter, index: usize, rotary: &Rotary, last: &str, columns: &[Column]) -> String {
    let at = |name: &str| at(index, name);
    let pick = |values: &[f32]| -> Vec<f32> {
        columns.iter().map(|c| c.pair.and_then(|pair| values.get(pair)).copied().unwrap_or(0.0)).collect()
    };
    let usual = graph.floats(&at("inv_freq"), &pick(&rotary.inv_freq));
    let (original, long) = match &rotary.long {
        LongContext::Same => return usual,
        LongContext::Switched { original, inv_freq } => {
            (*original, Long::Fixed(graph.floats(&at("long_inv_freq"), &pick(inv_freq))))
        }
        LongContext::Ntk { original, theta, factor } => (*original, Long::Ntk { theta: *theta, factor: *factor }),
    };
    let positions = graph.cast_always(&at("Cast_length"), last, DataType::Double);
    let largest = NodeDef::new("ReduceMax", at("ReduceMax")).attr_int("keepdims", 0);
    let last = graph.node_with(largest, &at("ReduceMax"), &[&positions]);
    let one = graph.double(1.0);
    let length = graph.node("Add", &at("Add_length"), &[&last, &one]);
    let limit = graph.double(original as f64);
    let is_long = graph.node("Greater", &at("Greater"), &[&length, &limit]);
    let long = match long {
        Long::Fixed(long) => long,
        Long::Ntk { theta, factor } => {
            let ratio = graph.node("Div", &at("Div_ratio"), &[&length, &limit]);
            ntk(graph, index, rotary.dim, (theta, factor), &ratio, columns)
        }
    };
    graph.node("Where", &at("Where"), &[&is_long, &long, &usual])
}

enum Long {
    Fixed(String),
    Ntk { theta: f64, factor: f64 },
}

/// `(theta · (factor · ratio − factor + 1)^(dim/(dim−2)))^(−2i/dim)`: in float64, rounded to float32 where transformers
/// rounds.
fn ntk(
    graph: &mut GraphWriter,
    index: usize,
    dim: usize,
    (theta, factor): (f64, f64),
    ratio: &str,
    columns: &[Column],
) -> String {
    let at = |name: &str| at(index, name);
    let (scale, shift) = (graph.double(factor), graph.double(factor - 1.0));
    let power = graph.double(dim as f64 / (dim as f64 - 2.0));
    let scaled = graph.node("Mul", &at("Mul_ntk"), &[ratio, &scale]);
    let shifted = graph.node("Sub", &at("Sub_ntk"), &[&scaled, &shift]);
    let stretched = graph.node("Pow", &at("Pow_ntk"), &[&shifted, &power]);
    let theta = graph.double(theta);
    let base = graph.node("Mul", &at("Mul_theta"), &[&stretched, &theta]);
    let base = graph.cast_always(&at("Cast_theta"), &base, DataType::Float);
    let base = graph.cast_always(&at("Cast_base"), &base, DataType::Double);
    let exponents: Vec<f64> =
        columns.iter().map(|c| f64::from((2 * c.pair.unwrap_or(0)) as f32 / dim as f32)).collect();
    let exponents = graph.doubles(&at("exponents"), &[exponents.len() as i64], &exponents);
    let wavelengths = graph.node("Pow", &at("Pow_frequencies"), &[&base, &exponents]);
    let wavelengths = graph.cast_always(&at("Cast_frequencies"), &wavelengths, DataType::Float);
    let ones: Vec<f32> = columns.iter().map(|c| if c.pair.is_some() { 1.0 } else { 0.0 }).collect();
    let ones = graph.floats(&at("turned"), &ones);
    graph.node("Div", &at("Div_frequencies"), &[&ones, &wavelengths])
}

/// Turns `[batch, heads, sequence, head_dim]` by angles [by element](Angles::by_element):
/// ```text
/// x ─┬──────────────────────────────────── Mul cos ─┐
///    └─ the pairs' elements exchanged ──── Mul sin ─┴ Add
/// ```
/// Halves are exchanged by `Split` and `Concat`, neighbours by `Gather`.
pub(super) fn rotate(graph: &mut GraphWriter, name: &str, rotary: &Rotary, angles: &Angles, x: &str) -> String {
    let at = |op: &str| format!("{name}/{op}");
    let width = graph.spec().attention.head_dim;
    let exchanged = if rotary.interleaved {
        let order: Vec<i64> = (0..width).map(|i| if i < rotary.dim { i ^ 1 } else { i } as i64).collect();
        let order = graph.integers(&order);
        graph.node_with(NodeDef::new("Gather", at("Gather")).attr_int("axis", -1), &at("Gather"), &[x, &order])
    } else {
        exchange_halves(graph, name, rotary.dim / 2, width, x)
    };
    let kept = graph.node("Mul", &at("Mul_cos"), &[x, &angles.cos]);
    let turned = graph.node("Mul", &at("Mul_sin"), &[&exchanged, &angles.sin]);
    graph.node("Add", &at("Add"), &[&kept, &turned])
}

fn exchange_halves(graph: &mut GraphWriter, name: &str, half: usize, width: usize, x: &str) -> String {
    let mut sizes = vec![half as i64; 2];
    if width > 2 * half {
        sizes.push((width - 2 * half) as i64);
    }
    let parts: Vec<String> = (0..sizes.len()).map(|part| format!("{name}/Split/output_{part}")).collect();
    let sizes = graph.integers(&sizes);
    let split = NodeDef::new("Split", format!("{name}/Split")).attr_int("axis", -1);
    graph.add(split.inputs([x, &sizes]).outputs(parts.iter().map(String::as_str)));
    let mut parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    parts.swap(0, 1);
    graph.concat(&format!("{name}/Concat"), -1, &parts)
}
