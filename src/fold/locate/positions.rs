//! How a graph counts positions, and so for which inputs the adapter's value is the one it was trained to be.
//!
//! An adapter is trained with positions counted from the attention mask, `max(cumsum(mask) - 1, 0)`. Scores of a rotated model
//! depend on differences of positions only, and a base model does not tell when they are counted otherwise; a rotated query does.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Serialize;

use super::unrotated::angles;
use super::{scope, shape};
use crate::onnx::{DataType, Index, Model, Node, TensorInfo};

const MICROSOFT: &str = "com.microsoft";

/// Where a graph has its positions from. Later ones are exact for fewer inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// Nothing in it depends on positions.
    Absent,
    /// It counts them from the attention mask.
    Mask,
    /// They are an input.
    Input,
    /// It counts columns: padding on the left counts too.
    Column,
    /// Its attention operator counts, and knows only rows that end in padding.
    Operator,
}

/// For which inputs a folded graph is exact.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Exactness {
    /// Where positions come from.
    pub positions: Positions,
    /// Whether the graph is told what is padding.
    pub attention_mask: bool,
    /// The inputs for which the adapter computes what it was trained to.
    pub exact_for: String,
}

impl Exactness {
    /// Whether rows that begin with padding are among them, when positions are fed as trained.
    pub fn holds_left_padded(&self) -> bool {
        self.attention_mask && self.positions <= Positions::Input
    }
}

/// For which inputs an adapter folded into this model is exact.
pub fn exactness(model: &Model) -> Exactness {
    let mut found = BTreeSet::new();
    let mut learned = BTreeSet::new();
    let visited = scope::visit(model, &mut |index, _| {
        for node in index.graph().nodes() {
            found.extend(rotation(index, node));
            learned.extend(table(index, node));
        }
        Ok(())
    });
    debug_assert!(visited.is_ok(), "what it calls does not fail");
    let most = found.last().or(learned.last()).copied();
    let positions = most.unwrap_or(Positions::Absent);
    let attention_mask = Index::new(model.graph()).input("attention_mask").is_some();
    let exact_for = match positions {
        _ if !attention_mask => "rows without padding: the graph has no attention_mask",
        Positions::Absent | Positions::Mask => "padding on either side",
        Positions::Input => {
            "padding on either side, with position_ids counted from the mask: max(cumsum(attention_mask) - 1, 0)"
        }
        Positions::Column => "rows without padding on the left: the graph counts positions by column",
        Positions::Operator => "rows without padding on the left: the attention operator counts positions by column",
    };
    Exactness { positions, attention_mask, exact_for: exact_for.to_owned() }
}

/// Where the positions of a node that rotates come from.
fn rotation(index: &Index, node: &Node) -> Vec<Positions> {
    let of = |slot: usize| node.input(slot).map(|tensor| source(index, tensor));
    let flag = |name: &str| node.attribute(name).and_then(|a| a.as_int()).unwrap_or(0) != 0;
    match (node.domain(), node.op_type()) {
        (MICROSOFT, "GroupQueryAttention") => {
            // without positions of its own, or a bias that hides padding, it goes by the length of a row
            let own = if flag("do_rotary") { of(9) } else { None };
            let hidden = node.input(10).is_some() && !(flag("do_rotary") && own.is_none());
            own.filter(|_| hidden).into_iter().chain((!hidden).then_some(Positions::Operator)).collect()
        }
        (MICROSOFT, "Attention") if flag("do_rotary") => vec![Positions::Operator],
        (MICROSOFT, "RotaryEmbedding") => of(1).into_iter().collect(),
        ("", "RotaryEmbedding") => of(3).or_else(|| of(1)).into_iter().collect(),
        ("", "Mul") => {
            let angles = node.inputs().iter().filter_map(|input| angles(index, input));
            let positions = angles.filter_map(|made| made.input(usize::from(made.is("", "Gather"))));
            // a row of the table of tokens is no angle
            let origins = positions.map(|tensor| Origin::of(index, tensor)).filter(|origin| !origin.tokens);
            origins.map(|origin| origin.positions()).collect()
        }
        _ => Vec::new(),
    }
}

/// Whether a tensor is made of tokens, and so no position.
pub(super) fn is_tokens(index: &Index, tensor: &str) -> bool {
    Origin::of(index, tensor).tokens
}

/// Where the positions of a table of learned positions come from; none for the table of tokens.
pub(super) fn table(index: &Index, node: &Node) -> Option<Positions> {
    let integer = |t: &TensorInfo| matches!(t.data_type(), DataType::Int64 | DataType::Int32 | DataType::Bool);
    let floats = |table: &str| index.initializer(table).is_some_and(|t| t.dims().len() == 2 && !integer(t));
    let positions = node.input(1).filter(|_| node.is("", "Gather") && node.input(0).is_some_and(floats))?;
    let origin = Origin::of(index, positions);
    (!origin.tokens).then(|| origin.positions())
}

fn source(index: &Index, tensor: &str) -> Positions {
    Origin::of(index, tensor).positions()
}

/// What a tensor is computed from.
#[derive(Default)]
struct Origin {
    given: bool,
    summed: bool,
    tokens: bool,
}

impl Origin {
    fn of(index: &Index, tensor: &str) -> Self {
        let (mut origin, mut seen, mut open) = (Self::default(), BTreeSet::new(), vec![tensor]);
        while let Some(tensor) = open.pop() {
            if shape::is_weight(index, tensor) {
                continue;
            }
            let Some(node) = index.producer(tensor) else {
                origin.given |= tensor.contains("position");
                origin.tokens |= tensor == "input_ids";
                continue;
            };
            // dimensions are no values
            if node.is("", "Shape") || !seen.insert(node.id()) {
                continue;
            }
            origin.summed |= node.is("", "CumSum");
            open.extend(node.inputs().iter().map(String::as_str).filter(|input| !input.is_empty()));
        }
        origin
    }

    fn positions(&self) -> Positions {
        match self {
            Self { given: true, .. } => Positions::Input,
            Self { summed: true, .. } => Positions::Mask,
            _ => Positions::Column,
        }
    }
}
