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
    /// The score of a key without value that every query sees.
    sink: Option<Sink>,
    window: Option<i64>,
    column: Option<String>,
}

enum Sink {
    /// The same for all heads.
    Number(f64),
    /// One for each head.
    OfHeads(String),
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
        let mut own = self.node("Max", "Max_lowest", &[&own, &low]);
        if let Some(sink) = &inside.sink {
            own = self.with_sink(&own, sink)?;
        }
        Ok(Scores { prefix, own, window: inside.window, column: inside.column })
    }

    /// The logarithm of a sum of exponentials to which that of a sink is added.
    fn with_sink(&mut self, own: &str, sink: &Sink) -> Result<String> {
        let sink = match sink {
            Sink::Number(number) => self.number(&format!("prefold/number_{number}"), *number)?,
            Sink::OfHeads(sinks) => {
                let wide = self.wide();
                let sinks = self.cast("Cast_sinks", sinks, types::float_type(self.index, sinks), wide);
                self.writer.reshape("Reshape_sinks", &sinks, "prefold/of_heads", &[1, -1, 1, 1])
            }
        };
        let most = self.node("Max", "Max_sink", &[own, &sink]);
        let mut sums = Vec::new();
        for (what, score) in [("own", own), ("sink", &sink)] {
            let exponent = self.node("Sub", &format!("Sub_sink_{what}"), &[score, &most]);
            sums.push(self.node("Exp", &format!("Exp_sink_{what}"), &[&exponent]));
        }
        let sum = self.node("Sum", "Sum_sink", &sums.iter().map(String::as_str).collect::<Vec<_>>());
        let sum = self.node("Log", "Log_sink", &[&sum]);
        Ok(self.node("Add", "Add_sink", &[&sum, &most]))
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

    /// Whether a key is not after its query, `[seq, total]`, where both end with the same token.
    fn causal(&mut self, query: &str, keys: &str) -> String {
        let (seq, total) = (self.size("queries", query, 2), self.size("keys", keys, 2));
        let columns = self.columns(&total, &seq);
        let positions = self.positions_of_keys(keys);
        self.node("LessOrEqual", "LessOrEqual_causal", &[&positions, &columns])
    }

    fn group_query(&mut self, node: &'a Node) -> Result<Inside> {
        let (index, site) = (self.index, self.writer.site);
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
        let window =
            window.or_else(|| window::find(index, node.input(10).into_iter().collect(), self.writer.job.source));
        self.refuse_biases(node.input(10).as_slice())?;
        let sinks = node.input(11).map(|sinks| Sink::OfHeads(sinks.to_owned()));
        let smooth = (integer(node, "smooth_softmax") != 0).then_some(Sink::Number(0.0));
        Ok(Inside {
            keys: self.dequantised(node, keys)?,
            softcap: float(node, "softcap"),
            bias: node.input(10).map(str::to_owned),
            seen,
            sink: sinks.or(smooth),
            window,
            column: Some(columns),
        })
    }

    /// Keys of a quantised cache as the operator reads them again: 8 bits each, or two of 4 bits in one, the first one in the low
    /// bits and 8 too large.
    fn dequantised(&mut self, node: &Node, keys: &str) -> Result<String> {
        const HALF: &str = "prefold/number_16";
        let Some(scale) = node.input(12) else { return Ok(keys.to_owned()) };
        let config = self.writer.job.adapter.config();
        let (kv_heads, dim) = (config.kv_heads() as i64, config.head_dim as i64);
        let query_type = self.writer.job.constants.data_type();
        self.set_type(DataType::Float);
        let mut keys = self.cast("Cast_kept_keys", keys, None, DataType::Float);
        if integer(node, "kv_cache_bit_width") == 4 {
            let (base, middle) = (self.number(HALF, 16.0)?, self.number("prefold/number_8", 8.0)?);
            let high = self.node("Div", "Div_high", &[&keys, &base]);
            let high = self.node("Floor", "Floor_high", &[&high]);
            let above = self.node("Mul", "Mul_high", &[&high, &base]);
            let low = self.node("Sub", "Sub_low", &[&keys, &above]);
            let mut split = Vec::new();
            for (what, part) in [("low", low), ("high", high)] {
                let name = format!("Reshape_{what}");
                split.push(self.writer.reshape(&name, &part, "prefold/halves_apart", &[0, 0, 0, dim / 2, 1]));
            }
            let both = self.writer.node_with(
                |name| NodeDef::new("Concat", name).attr_int("axis", 4),
                "Concat_halves",
                &split.iter().map(String::as_str).collect::<Vec<_>>(),
            );
            keys = self.writer.reshape("Reshape_halves", &both, "prefold/halves_together", &[0, 0, 0, dim]);
            keys = self.node("Sub", "Sub_middle", &[&keys, &middle]);
        }
        let mut scale = self.cast("Cast_key_scale", scale, types::float_type(self.index, scale), DataType::Float);
        if node.attribute("k_quant_type").and_then(|a| a.as_str()) == Some("PER_CHANNEL") {
            scale = self.writer.reshape("Reshape_key_scale", &scale, "prefold/of_channels", &[1, kv_heads, 1, dim]);
        }
        keys = self.node("Mul", "Mul_key_scale", &[&keys, &scale]);
        self.set_type(query_type);
        Ok(self.cast("Cast_dequantised", &keys, Some(DataType::Float), query_type))
    }

    fn standard(&mut self, node: &'a Node) -> Result<Inside> {
        let (index, site) = (self.index, &self.writer.site.scaled());
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
        let lengths = node
            .input(6)
            .map(|lengths| self.writer.reshape("Reshape_lengths", lengths, "prefold/of_rows", &[-1, 1, 1, 1]));
        let positions = lengths.as_ref().map(|_| self.positions_of_keys(&inside.keys.clone()));
        if let (Some(lengths), Some(positions)) = (&lengths, &positions) {
            inside.seen.push(self.node("Less", "Less_lengths", &[positions, lengths]));
        }
        if integer(node, "is_causal") != 0 {
            let keys = inside.keys.clone();
            let causal = match (&lengths, node.input(4)) {
                // the last query's own key is the last one
                (None, Some(_)) => self.causal(&split, &keys),
                // queries and keys begin together
                (None, None) => {
                    let seq = self.size("queries", &split, 2);
                    let columns = self.columns(&seq, &seq);
                    let positions = self.positions_of_keys(&keys);
                    self.node("LessOrEqual", "LessOrEqual_causal", &[&positions, &columns])
                }
                // a row's last query stands where its keys end
                (Some(lengths), _) => {
                    let seq = self.size("queries", &split, 2);
                    let columns = self.columns(&seq, &seq);
                    let past = self.node("Sub", "Sub_lengths", &[lengths, &seq]);
                    let columns = self.node("Add", "Add_lengths", &[&columns, &past]);
                    let positions = self.positions_of_keys(&keys);
                    self.node("LessOrEqual", "LessOrEqual_causal", &[&positions, &columns])
                }
            };
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
        self.refuse(node, &[(8, "buffer that past and present share"), (9, "cache of several beams")])?;
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
            return Err(stopped(
                site,
                "it rotates by angles of its own, which only kernels for GPUs do: nothing at hand could judge the prefix",
            ));
        }
        self.refuse(node, &[(6, "buffer that past and present share")])?;
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

    /// Which keys are seen by where each row's end, `[batch]`, and begin too, `[2 · batch]`; of `[3 · batch + 2]` the first ones are the
    /// ends. How many there are is known when the graph runs.
    fn lengths_of_rows(&mut self, lengths: &str, keys: &str, seen: &mut Vec<String>) {
        let lengths = self.cast("Cast_lengths", lengths, None, DataType::Int64);
        let (zero, axis, two) = (
            self.integers("prefold/zero", &[0]),
            self.integers("prefold/list_0", &[0]),
            self.integers("prefold/two", &[2]),
        );
        let shape = self.node("Shape", "Shape_key_rows", &[keys]);
        let one = self.integers("prefold/one", &[1]);
        let batch = self.node("Slice", "Slice_batch", &[&shape, &zero, &one]);
        let twice = self.node("Mul", "Mul_batch", &[&batch, &two]);
        let count = self.node("Shape", "Shape_lengths", &[&lengths]);
        let positions = self.positions_of_keys(keys);
        let ends = self.node("Slice", "Slice_ends", &[&lengths, &zero, &batch, &axis]);
        let ends = self.writer.reshape("Reshape_ends", &ends, "prefold/of_rows", &[-1, 1, 1, 1]);
        seen.push(self.node("Less", "Less_ends", &[&positions, &ends]));
        // zeros behind them, so that there is always a second part
        let zeros = self.node("Expand", "Expand_zeros", &[&zero, &batch]);
        let padded = self.writer.node_with(
            |name| NodeDef::new("Concat", name).attr_int("axis", 0),
            "Concat_lengths",
            &[&lengths, &zeros],
        );
        let starts = self.node("Slice", "Slice_starts", &[&padded, &batch, &twice, &axis]);
        let has_starts = self.node("Equal", "Equal_twice", &[&count, &twice]);
        let has_starts = self.cast("Cast_twice", &has_starts, Some(DataType::Bool), DataType::Int64);
        let starts = self.node("Mul", "Mul_starts", &[&starts, &has_starts]);
        let starts = self.writer.reshape("Reshape_starts", &starts, "prefold/of_rows", &[-1, 1, 1, 1]);
        seen.push(self.node("GreaterOrEqual", "GreaterOrEqual_starts", &[&positions, &starts]));
    }

    /// The masks of MultiHeadAttention and Attention of ONNX Runtime: of keys, in each row or for each query, and of what comes later.
    fn masked(&mut self, node: &'a Node, slot: usize, inside: &mut Inside) -> Result<()> {
        let (index, site) = (self.index, self.writer.site);
        if let Some(mask) = node.input(slot) {
            match locate::shape::rank(index, mask) {
                Some(1) => {
                    let keys = inside.keys.clone();
                    self.lengths_of_rows(mask, &keys, &mut inside.seen);
                }
                Some(2) => {
                    let real = self.cast("Cast_mask", mask, None, DataType::Bool);
                    let rows = self.writer.reshape("Reshape_mask", &real, "prefold/mask_of_keys", &[0, 1, 1, -1]);
                    inside.seen.push(rows);
                }
                Some(3) => {
                    let real = self.cast("Cast_mask", mask, None, DataType::Bool);
                    let rows = self.writer.reshape("Reshape_mask", &real, "prefold/mask_of_pairs", &[0, 0, 1, -1]);
                    inside.seen.push(self.writer.transpose("Transpose_mask", &rows));
                }
                found => {
                    let found = found.map_or("unknown".to_owned(), |rank| rank.to_string());
                    return Err(stopped(
                        site,
                        format!(
                            "prefix tuning beside a mask of keys of {found} dimensions is not known: no kernel of ONNX Runtime's \
                             CPU takes more than three"
                        ),
                    ));
                }
            }
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
