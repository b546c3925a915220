//! How a graph counts positions, and so for which inputs the adapter's value is the one it was trained to be.
//!
//! An adapter is trained with positions counted from the attention mask, `max(cumsum(mask) - 1, 0)`. Scores of a rotated model
//! depend on differences of positions only, and a base model does not tell when they are counted otherwise; a rotated query does.

use std::collections::{BTreeSet, HashMap, HashSet};

use schemars::JsonSchema;
use serde::Serialize;

use super::unrotated::angles;
use super::{flow, scope, shape};
use crate::onnx::{DataType, Index, Model, Node, NodeId, TensorInfo};

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
        let mut origins = Origins::new(index);
        for node in index.graph().nodes() {
            found.extend(rotation(&mut origins, node));
            learned.extend(table(&mut origins, node));
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

/// Whether a tensor is computed from positions that are an input.
pub(in crate::fold) fn is_from_positions(index: &Index, tensor: &str) -> bool {
    Origins::new(index).of(tensor).given
}

/// Where the positions of a node that rotates come from.
fn rotation(origins: &mut Origins, node: &Node) -> Vec<Positions> {
    let index = origins.index;
    let mut of = |slot: usize| node.input(slot).map(|tensor| origins.of(tensor).positions());
    // rows of a table of the pass's own angles are no positions: these are what the angles are made from
    let row_of = |origins: &mut Origins, rows: &str, table: usize| {
        let mut origin = origins.of(rows);
        origin.add(node.input(table).map_or(Origin::default(), |table| origins.of(table)));
        origin.positions()
    };
    let flag = |name: &str| node.attribute(name).and_then(|a| a.as_int()).unwrap_or(0) != 0;
    match (node.domain(), node.op_type()) {
        (MICROSOFT, "GroupQueryAttention") => {
            // without positions of its own, or a bias that hides padding, it goes by the length of a row
            let own = if flag("do_rotary") { of(9) } else { None };
            let hidden = node.input(10).is_some() && !(flag("do_rotary") && own.is_none());
            own.filter(|_| hidden).into_iter().chain((!hidden).then_some(Positions::Operator)).collect()
        }
        (MICROSOFT, "Attention") if flag("do_rotary") => vec![Positions::Operator],
        (MICROSOFT, "RotaryEmbedding") => node.input(1).map(|rows| row_of(origins, rows, 2)).into_iter().collect(),
        ("", "RotaryEmbedding") => {
            node.input(3).or(node.input(1)).map(|rows| row_of(origins, rows, 1)).into_iter().collect()
        }
        ("", "Mul") => {
            let angles = node.inputs().iter().filter_map(|input| angles(index, input));
            let positions = angles.filter_map(|made| made.input(usize::from(made.is("", "Gather"))));
            // a row of the table of tokens is no angle
            let found = positions.map(|tensor| origins.of(tensor)).filter(|origin| !origin.tokens);
            found.map(|origin| origin.positions()).collect()
        }
        _ => Vec::new(),
    }
}

/// Where the positions of a table of learned positions come from; none for the table of tokens.
pub(super) fn table(origins: &mut Origins, node: &Node) -> Option<Positions> {
    let index = origins.index;
    let integer = |t: &TensorInfo| matches!(t.data_type(), DataType::Int64 | DataType::Int32 | DataType::Bool);
    let floats = |table: &str| index.initializer(table).is_some_and(|t| t.dims().len() == 2 && !integer(t));
    let positions = node.input(1).filter(|_| node.is("", "Gather") && node.input(0).is_some_and(floats))?;
    let origin = origins.of(positions);
    (!origin.tokens).then(|| origin.positions())
}

/// What tensors are computed from, found once for each node.
pub(super) struct Origins<'i, 'g> {
    index: &'i Index<'g>,
    known: HashMap<NodeId, Origin>,
    entered: HashSet<NodeId>,
}

impl<'i, 'g> Origins<'i, 'g> {
    pub(super) fn new(index: &'i Index<'g>) -> Self {
        Self { index, known: HashMap::new(), entered: HashSet::new() }
    }

    /// Whether a tensor is made of tokens, and so no position.
    pub(super) fn is_tokens(&mut self, tensor: &str) -> bool {
        self.of(tensor).tokens
    }

    fn of(&mut self, tensor: &str) -> Origin {
        let Self { index, known, entered } = self;
        if let Some(node) = index.producer(tensor) {
            flow::after_inputs(index, node, entered, &mut |node| {
                let mut origin = Origin { summed: node.is("", "CumSum"), ..Origin::default() };
                // dimensions are no values
                if !node.is("", "Shape") {
                    let inputs = node.inputs().iter().filter(|input| !input.is_empty());
                    inputs.for_each(|input| origin.add(Origin::of(index, known, input)));
                }
                known.insert(node.id(), origin);
            });
        }
        Origin::of(index, known, tensor)
    }
}

/// What a tensor is computed from.
#[derive(Clone, Copy, Default)]
struct Origin {
    given: bool,
    summed: bool,
    tokens: bool,
}

impl Origin {
    /// By what is known of the node that made it.
    fn of(index: &Index, known: &HashMap<NodeId, Self>, tensor: &str) -> Self {
        if shape::is_weight(index, tensor) {
            return Self::default();
        }
        match index.producer(tensor) {
            Some(node) => known.get(&node.id()).copied().unwrap_or_default(),
            None => Self { given: tensor.contains("position"), summed: false, tokens: tensor == "input_ids" },
        }
    }

    fn add(&mut self, other: Self) {
        self.given |= other.given;
        self.summed |= other.summed;
        self.tokens |= other.tokens;
    }

    fn positions(&self) -> Positions {
        match self {
            Self { given: true, .. } => Positions::Input,
            Self { summed: true, .. } => Positions::Mask,
            _ => Positions::Column,
        }
    }
}
