//! Scores of an operator that keeps them inside: made once more beside it, over the keys that it puts out or reads.
//!
//! ```text
//! query ─ Reshape [B, kv, group · S, d] ─ MatMul keysᵀ ─ Reshape [B, h, S, T] ─ scale ─ (cap) ─ (bias) ─ (Where seen) ─ ReduceLogSumExp
//! ```
//! The operator's own output stays as it is.

use candle_core::Tensor;

use super::{Block, LOWEST, Scores, stopped, types, window};
use crate::fold::Result;
use crate::fold::locate;
use crate::onnx::{DataType, Index, Node, NodeDef};

const MICROSOFT: &str = "com.microsoft";

pub(super) fn is_known(node: &Node) -> bool {
    let fused = ["GroupQueryAttention", "MultiHeadAttention", "Attention"];
    node.is("", "Attention") || fused.iter().any(|op| node.is(MICROSOFT, op))
}

/// What an operator makes of its product of queries and keys.
#[derive(Default)]
struct Inside {
    /// `[batch, kv_heads, total, head_dim]`.
    keys: String,
    softcap: Option<f32>,
    /// Added to the scores.
    bias: Option<String>,
    /// Whether a key is seen: each broadcasts to the scores.
    seen: Vec<String>,
    window: Option<i64>,
    column: Option<String>,
}

fn integer(node: &Node, name: &str) -> i64 {
    node.attribute(name).and_then(|a| a.as_int()).unwrap_or(0)
}

fn float(node: &Node, name: &str) -> Option<f32> {
    node.attribute(name).and_then(|a| a.as_float()).filter(|value| *value != 0.0)
}

impl<'a> Block<'a, '_> {
    pub(super) fn beside_operator(&mut self, node: &'a Node, key: &Tensor) -> Result<Scores> {
        let (own, prefix) = self.queries(Some(node))?;
        let inside = match (node.domain(), node.op_type()) {
            (MICROSOFT, "GroupQueryAttention") => self.group_query(node)?,
            (MICROSOFT, "MultiHeadAttention") => self.multi_head(node)?,
            (MICROSOFT, _) => self.projected(node)?,
            _ => self.standard(node)?,
        };
        let key = self.parameter("key", key)?;
        let config = self.writer.job.adapter.config();
        let (heads, dim) = (config.num_heads as i64, config.head_dim);
        let scale = float(node, "scale").map_or((dim as f64).sqrt().recip(), f64::from);
        let prefix = self.node("MatMul", "MatMul_scores", &[&prefix, &key]);
        let grouped = self.grouped(&own, &inside.keys);
        let turned = self.writer.node_with(
            |name| NodeDef::new("Transpose", name).attr_ints("perm", &[0, 1, 3, 2]),
            "Transpose_keys",
            &[&inside.keys],
        );
        let scores = self.node("MatMul", "MatMul_own", &[&grouped, &turned]);
        let scores = self.writer.reshape("Reshape_own", &scores, "prefold/every_head", &[0, heads, -1, 0]);

        let from = self.writer.job.constants.data_type();
        let wide = self.wide();
        self.set_type(wide);
        let mut scaled = Vec::new();
        for (what, mut scores) in [("prefix", prefix), ("own", scores)] {
            scores = self.cast(&format!("Cast_{what}"), &scores, Some(from), wide);
            let by = self.number(&format!("prefold/number_{scale}"), scale)?;
            scores = self.node("Mul", &format!("Mul_{what}"), &[&scores, &by]);
            if let Some(cap) = inside.softcap {
                let cap = self.number(&format!("prefold/number_{cap}"), cap.into())?;
                scores = self.node("Div", &format!("Div_{what}"), &[&scores, &cap]);
                scores = self.node("Tanh", &format!("Tanh_{what}"), &[&scores]);
                scores = self.node("Mul", &format!("Mul_cap_{what}"), &[&scores, &cap]);
            }
            scaled.push(scores);
        }
        let (Some(mut scores), Some(prefix)) = (scaled.pop(), scaled.pop()) else {
            return Err(stopped(self.writer.site, "its scores were not made"));
        };
        if let Some(bias) = &inside.bias {
            let bias = self.cast("Cast_bias", bias, types::float_type(self.index, bias), wide);
            scores = self.node("Add", "Add_bias", &[&scores, &bias]);
        }
        let low = self.number("prefold/lowest", LOWEST)?;
        for seen in &inside.seen {
            scores = self.node("Where", "Where_seen", &[seen, &scores, &low]);
        }
        let own = self.reduce("ReduceLogSumExp", "ReduceLogSumExp", &scores);
        let own = self.node("Max", "Max_lowest", &[&own, &low]);
        Ok(Scores { prefix, own, window: inside.window, column: inside.column })
    }

    /// The query heads of a key head side by side.
    fn grouped(&mut self, query: &str, keys: &str) -> String {
        let dim = self.writer.job.adapter.config().head_dim as i64;
        let (one, two) = (self.integers("prefold/one", &[1]), self.integers("prefold/two", &[2]));
        let shape = self.node("Shape", "Shape_keys", &[keys]);
        let heads = self.node("Slice", "Slice_kv_heads", &[&shape, &one, &two]);
        let (batch, rest) = (self.integers("prefold/zero", &[0]), self.integers("prefold/rest", &[-1, dim]));
        let shape = self.writer.node_with(
            |name| NodeDef::new("Concat", name).attr_int("axis", 0),
            "Concat_grouped",
            &[&batch, &heads, &rest],
        );
        self.node("Reshape", "Reshape_grouped", &[query, &shape])
    }

    fn refuse(&self, node: &Node, inputs: &[(usize, &str)]) -> Result<()> {
        match inputs.iter().find(|(slot, _)| node.input(*slot).is_some()) {
            Some((_, what)) => Err(stopped(self.writer.site, format!("prefix tuning beside its {what} is not known"))),
            None => Ok(()),
        }
    }

    /// `[batch, total, kv_heads · head_dim]` with its heads first.
    fn split_keys(&mut self, keys: &str) -> String {
        let dim = self.writer.job.adapter.config().head_dim as i64;
        let split = self.writer.reshape("Reshape_keys", keys, "prefold/split_keys", &[0, 0, -1, dim]);
        self.writer.transpose("Transpose_own_keys", &split)
    }

    fn positions_of_keys(&mut self, keys: &str) -> String {
        let (zero, one) = (self.scalar(0), self.scalar(1));
        let total = self.size("keys", keys, 2);
        self.node("Range", "Range_keys", &[&zero, &total, &one])
    }

    /// Whether a key is not after its query, `[seq, total]`; both end with the same token.
    fn causal(&mut self, query: &str, keys: &str) -> String {
        let (seq, total) = (self.size("queries", query, 2), self.size("keys", keys, 2));
        let columns = self.columns(&total, &seq);
        let positions = self.positions_of_keys(keys);
        self.node("LessOrEqual", "LessOrEqual_causal", &[&positions, &columns])
    }

    fn group_query(&mut self, node: &'a Node) -> Result<Inside> {
        let (index, site) = (self.index, self.writer.site);
        self.refuse(node, &[(11, "sinks"), (12, "quantised keys"), (13, "quantised values")])?;
        if integer(node, "smooth_softmax") != 0 {
            return Err(stopped(site, "prefix tuning beside its smooth softmax is not known"));
        }
        let Some(keys) = node.output(1) else {
            return Err(stopped(site, "it does not put out its keys, which its scores are made of once more"));
        };
        let source = locate::columns(node, site)?;
        for node in source.nodes {
            if self.writer.job.constants.is_new(node.name()) {
                self.writer.job.patch.insert_before(self.writer.first, node);
            }
        }
        for tensor in source.initializers {
            if self.writer.job.constants.is_new(tensor.name()) {
                self.writer.job.patch.add_initializer(tensor);
            }
        }
        let columns = self.writer.reshape("Reshape_columns", &source.tensor, "prefold/rows_of_columns", &[0, 1, -1, 1]);
        let positions = self.positions_of_keys(keys);
        let mut seen = vec![self.node("LessOrEqual", "LessOrEqual_causal", &[&positions, &columns])];
        let window = Some(integer(node, "local_window_size")).filter(|window| *window > 0);
        if let Some(window) = window {
            let width = self.scalar(window);
            let from = self.node("Sub", "Sub_window", &[&columns, &width]);
            seen.push(self.node("Greater", "Greater_window", &[&positions, &from]));
        }
        // an exporter may write the window into the bias instead
        let window = window.or_else(|| window::find(index, node.input(10).into_iter().collect(), self.writer.job.source));
        Ok(Inside {
            keys: keys.to_owned(),
            softcap: float(node, "softcap"),
            bias: node.input(10).map(str::to_owned),
            seen,
            window,
            column: Some(columns),
        })
    }

    fn standard(&mut self, node: &'a Node) -> Result<Inside> {
        let (index, site) = (self.index, &self.writer.site.scaled());
        self.refuse(node, &[(6, "lengths of keys (nonpad_kv_seqlen)")])?;
        if float(node, "softcap").is_some() {
            return Err(stopped(site, "runtimes differ in whether its soft cap comes before its mask"));
        }
        let (query, key) = (node.input(0).unwrap_or_default(), node.input(1).unwrap_or_default());
        let keys = match (node.output(1), node.input(4)) {
            (Some(present), _) => present.to_owned(),
            (None, past) => {
                let is_split = integer(node, "q_num_heads") == 0 || super::rank_is(index, key, 4);
                let own = if is_split { key.to_owned() } else { self.split_keys(key) };
                match past {
                    None => own,
                    Some(past) => self.writer.node_with(
                        |name| NodeDef::new("Concat", name).attr_int("axis", 2),
                        "Concat_keys",
                        &[past, &own],
                    ),
                }
            }
        };
        let mut inside = Inside { keys, ..Inside::default() };
        if let Some(mask) = node.input(3) {
            if is_bool(index, mask) {
                inside.seen.push(mask.to_owned());
            } else {
                inside.bias = Some(mask.to_owned());
            }
            inside.window = window::find(index, vec![mask], self.writer.job.source);
            self.refuse_biases(&[mask])?;
        }
        let split = if site.query_layout == crate::fold::Layout::Merged {
            self.heads_first("of_columns", query)
        } else {
            query.to_owned()
        };
        if integer(node, "is_causal") != 0 {
            let keys = inside.keys.clone();
            let causal = self.causal(&split, &keys);
            inside.seen.push(causal);
        }
        if inside.window.is_some() {
            let keys = inside.keys.clone();
            let (seq, total) = (self.size("queries", &split, 2), self.size("keys", &keys, 2));
            inside.column = Some(self.columns(&total, &seq));
        }
        Ok(inside)
    }

    fn multi_head(&mut self, node: &'a Node) -> Result<Inside> {
        let (index, site) = (self.index, self.writer.site);
        let config = self.writer.job.adapter.config();
        let width = (config.num_heads * config.head_dim) as i64;
        let keys = match (node.output(1), node.input(1)) {
            (Some(present), _) => present.to_owned(),
            (None, Some(key)) if node.input(6).is_none() && super::rank_is(index, key, 3) => {
                let mut keys = key.to_owned();
                if let Some(bias) = node.input(3) {
                    let own = self.part_of("bias", bias, 0, width);
                    keys = self.node("Add", "Add_key_bias", &[&keys, &own]);
                }
                self.split_keys(&keys)
            }
            _ => return Err(stopped(site, "its keys are packed or joined inside, and it does not put them out")),
        };
        let mut inside = Inside { keys, bias: node.input(5).map(str::to_owned), ..Inside::default() };
        self.masked(node, 4, &mut inside)?;
        Ok(inside)
    }

    /// The keys of an operator that projects inside.
    fn projected(&mut self, node: &'a Node) -> Result<Inside> {
        let site = self.writer.site;
        let (Some(x), Some(weights), Some(width)) = (node.input(0), node.input(1), site.width) else {
            return Err(stopped(site, "its weights are not known"));
        };
        if integer(node, "do_rotary") != 0 {
            return Err(stopped(site, "it rotates by angles of its own"));
        }
        let keys = match (node.output(1), node.input(4)) {
            // [2, batch, heads, total, head_dim]
            (Some(present), _) => {
                let first = self.scalar(0);
                self.writer.node_with(
                    |name| NodeDef::new("Gather", name).attr_int("axis", 0),
                    "Gather_keys",
                    &[present, &first],
                )
            }
            (None, None) => {
                let own = self.part_of("weights", weights, 1, width);
                let mut keys = self.node("MatMul", "MatMul_keys", &[x, &own]);
                if let Some(bias) = node.input(2) {
                    let own = self.part_of("bias", bias, 0, width);
                    keys = self.node("Add", "Add_key_bias", &[&keys, &own]);
                }
                self.split_keys(&keys)
            }
            _ => return Err(stopped(site, "its keys are joined inside, and it does not put them out")),
        };
        let mut inside = Inside { keys, bias: node.input(5).map(str::to_owned), ..Inside::default() };
        self.masked(node, 3, &mut inside)?;
        Ok(inside)
    }

    /// The second of three parts of an axis: that of the keys.
    fn part_of(&mut self, what: &str, x: &str, axis: i64, width: i64) -> String {
        let from = self.integers(&format!("prefold/list_{width}"), &[width]);
        let to = self.integers(&format!("prefold/list_{}", 2 * width), &[2 * width]);
        let axis = self.integers(&format!("prefold/list_{axis}"), &[axis]);
        self.node("Slice", &format!("Slice_{what}"), &[x, &from, &to, &axis])
    }

    /// The masks of MultiHeadAttention and Attention of ONNX Runtime: of keys, `[batch, total]`, and of what comes later.
    fn masked(&mut self, node: &'a Node, slot: usize, inside: &mut Inside) -> Result<()> {
        let (index, site) = (self.index, self.writer.site);
        if let Some(mask) = node.input(slot) {
            if !super::rank_is(index, mask, 2) {
                return Err(stopped(
                    site,
                    "prefix tuning beside a mask of keys that is not [batch, total] is not known",
                ));
            }
            let real = self.cast("Cast_mask", mask, None, DataType::Bool);
            inside.seen.push(self.writer.reshape("Reshape_mask", &real, "prefold/mask_of_keys", &[0, 1, 1, -1]));
        }
        let bias: Vec<&str> = inside.bias.as_deref().into_iter().filter_map(|bias| known(index, bias)).collect();
        self.refuse_biases(&bias)?;
        inside.window = window::find(index, bias, self.writer.job.source);
        if integer(node, "unidirectional") != 0 || inside.window.is_some() {
            let (query, _) = self.queries(None)?;
            let keys = inside.keys.clone();
            if integer(node, "unidirectional") != 0 {
                let causal = self.causal(&query, &keys);
                inside.seen.push(causal);
            }
            let (seq, total) = (self.size("queries", &query, 2), self.size("keys", &keys, 2));
            inside.column = Some(self.columns(&total, &seq));
        }
        Ok(())
    }
}

/// The name as the graph holds it.
fn known<'g>(index: &Index<'g>, tensor: &str) -> Option<&'g str> {
    index.producer(tensor)?.outputs().iter().map(String::as_str).find(|output| *output == tensor)
}

/// Whether a mask chooses, and is not added.
fn is_bool(index: &Index, mask: &str) -> bool {
    let mut tensor = mask;
    for _ in 0..16 {
        if let Some(declared) = index.value(tensor).and_then(|value| value.elem_type()) {
            return declared == DataType::Bool;
        }
        let Some(node) = index.producer(tensor) else { return false };
        match (node.op_type(), node.input(0)) {
            ("And" | "Or" | "Not" | "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual", _) => return true,
            ("Cast", _) => {
                return node.attribute("to").and_then(|a| a.as_int()) == Some(i64::from(DataType::Bool.code()));
            }
            (
                "Expand" | "Gather" | "GatherND" | "Identity" | "Reshape" | "Slice" | "Transpose" | "Unsqueeze",
                Some(behind),
            ) => {
                tensor = behind;
            }
            _ => return false,
        }
    }
    false
}
