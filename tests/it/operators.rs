//! Operators of attention that no stored graph has in this form, in graphs of one node. ONNX Runtime judges: fed with keys
//! that are the queries, an operator puts out as its present keys what it made of them, and that is the query that the fold
//! makes beside it.

use std::path::Path;

use ndarray::{Array4, ArrayD, Axis, concatenate, s};
use prefold::adapter::{Adapter, AdapterConfig, Query};
use prefold::fold::locate::{self, QuerySource};
use prefold::fold::{FoldOptions, Layout, NamedAdapter, fold};
use prefold::onnx::{DataType, Dim, Model, ModelBuilder, NodeDef, TensorDef, ValueDef};
use prefold::runtime::{DType, NamedValues, OrtOptions, OrtSession, Session, Value};

use crate::fused::runtime;

const MICROSOFT: &str = "com.microsoft";
const HEADS: usize = 3;
const DIM: usize = 32;
const WIDTH: usize = HEADS * DIM;
/// Positions of a prefix.
const PREFIX: usize = 3;

/// Numbers without a pattern.
fn numbers(seed: usize, shape: &[usize]) -> ArrayD<f32> {
    let count = shape.iter().product();
    let values =
        (0..count).map(|i| ((i * 7919 + seed * 104_729 + 13) as f32 * 0.618_034).fract() * 2.0 - 1.0).collect();
    ArrayD::from_shape_vec(shape.to_vec(), values).unwrap()
}

/// A graph of one operator.
#[derive(Default)]
struct Graph {
    feeds: NamedValues,
    constants: Vec<TensorDef>,
    nodes: Vec<NodeDef>,
    /// The operator's outputs beside the first, which is `output`.
    presents: Vec<&'static str>,
    /// Whether the inputs' last dimensions are declared.
    declared: bool,
    /// Whether the operator is of opset 24, and not of 23.
    newest: bool,
}

impl Graph {
    fn feed(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.feeds.insert(name, value);
        self
    }

    fn constant(mut self, name: &str, value: &ArrayD<f32>) -> Self {
        let dims: Vec<i64> = value.shape().iter().map(|d| *d as i64).collect();
        self.constants.push(TensorDef::from_f32s(name, &dims, value.as_standard_layout().as_slice().unwrap()));
        self
    }

    fn node(mut self, node: NodeDef) -> Self {
        self.nodes.push(node);
        self
    }

    fn builder(&self) -> ModelBuilder {
        let mut builder = ModelBuilder::new("one_operator", 10);
        builder.opset("", if self.newest { 24 } else { 23 }).opset(MICROSOFT, 1);
        for (name, value) in self.feeds.iter() {
            let data_type = match value.dtype() {
                DType::I64 => DataType::Int64,
                DType::I32 => DataType::Int32,
                _ => DataType::Float,
            };
            let mut dims = vec![Dim::Unknown; value.shape().len()];
            if let Some((dim, size)) = dims.last_mut().zip(value.shape().last()).filter(|_| self.declared) {
                *dim = Dim::Value(*size as i64);
            }
            builder.input(ValueDef::new(name, data_type, dims));
        }
        for constant in &self.constants {
            builder.initializer(constant.clone());
        }
        builder
    }

    /// The whole graph. Something reads the operator's output, as `o_proj` does.
    fn model(&self) -> Model {
        let mut builder = self.builder();
        for node in &self.nodes {
            builder.node(node.clone());
        }
        builder.node(NodeDef::new("Identity", "o_proj").inputs(["output"]).outputs(["read"]));
        for name in std::iter::once(&"read").chain(&self.presents) {
            let rank = match *name {
                "read" => 0,
                "present" => 5,
                _ => 4,
            };
            builder.output(ValueDef::new(*name, DataType::Float, (0..rank).map(|_| Dim::Unknown)));
        }
        builder.build().unwrap()
    }

    fn source(&self, wanted: Query) -> QuerySource {
        let model = self.model();
        let sites = locate::sites(&model).unwrap();
        assert_eq!(sites.len(), 1);
        locate::query(&model, &sites[0], wanted).unwrap()
    }

    /// Runs the nodes that make the query, and those before the operator; `[batch, heads, seq, head_dim]`.
    fn query(&self, library: &Path, wanted: Query) -> Array4<f32> {
        let source = self.source(wanted);
        let mut builder = self.builder();
        for node in self.nodes.iter().take(self.nodes.len() - 1).chain(&source.nodes) {
            builder.node(node.clone());
        }
        for constant in source.initializers {
            builder.initializer(constant);
        }
        builder.node(NodeDef::new("Identity", "found").inputs([source.tensor]).outputs(["found"]));
        builder.output(ValueDef::new("found", DataType::Float, []));
        let found = run(library, &builder.build().unwrap(), &self.feeds).take("found").unwrap().into_f32().unwrap();
        match source.layout {
            Layout::HeadsFirst => found.into_dimensionality().unwrap(),
            Layout::SeqFirst | Layout::Merged => heads_first(&found),
        }
    }

    /// Folds an adapter, and finds the output to be that of before and the adapter's term on this query.
    fn carries(&self, library: &Path, label: &str, query: &Array4<f32>) {
        let fields = serde_json::json!({"method": "prefix_plus", "num_layers": 1, "num_heads": HEADS, "head_dim": DIM});
        let config: AdapterConfig = serde_json::from_value(fields).unwrap();
        let matrix = numbers(99, &[HEADS, DIM, DIM]);
        let values = matrix.as_slice().unwrap().to_vec();
        let tensor = candle_core::Tensor::from_vec(values, (HEADS, DIM, DIM), &candle_core::Device::Cpu).unwrap();
        let adapter = Adapter::new(config, [("layers.0.M".to_owned(), tensor)].into()).unwrap();
        let model = self.model();
        let scratch = tempfile::tempdir().unwrap();
        let adapters = [NamedAdapter { name: "one".into(), adapter: adapter.clone() }];
        let options = FoldOptions::default();
        let (folded, _) = fold(&model, scratch.path(), &adapters, options, scratch.path()).unwrap();
        let read = |model: &Model| run(library, model, &self.feeds).take("read").unwrap().into_f32().unwrap();
        let (before, after) = (read(&model), read(&folded));
        let merged = before.ndim() == 3;
        let (before, after): (Array4<f32>, Array4<f32>) = if merged {
            (heads_first(&before), heads_first(&after))
        } else {
            (before.into_dimensionality().unwrap(), after.into_dimensionality().unwrap())
        };
        let mut expected = before;
        for ((b, h, t, o), x) in expected.indexed_iter_mut() {
            for i in 0..DIM {
                let q = query[[b, h, t, i]];
                *x += if q > 0.0 { q } else { q.exp_m1() } * matrix[[h, i, o]];
            }
        }
        near(label, &after, &expected);
    }

    /// Folds a prefix, or says why it cannot be.
    fn with_prefix(
        &self,
        kv_heads: usize,
        key: &ArrayD<f32>,
        value: &ArrayD<f32>,
    ) -> Result<Model, Box<prefold::fold::Error>> {
        let fields = serde_json::json!({
            "method": "prefix", "num_virtual_tokens": PREFIX, "num_layers": 1,
            "num_heads": HEADS, "num_kv_heads": kv_heads, "head_dim": DIM,
        });
        let config: AdapterConfig = serde_json::from_value(fields).unwrap();
        let tensor = |name: &str, values: &ArrayD<f32>| {
            let shape = (kv_heads, PREFIX, DIM);
            let values = values.iter().copied().collect::<Vec<_>>();
            (name.to_owned(), candle_core::Tensor::from_vec(values, shape, &candle_core::Device::Cpu).unwrap())
        };
        let tensors = [tensor("layers.0.key", key), tensor("layers.0.value", value)];
        let adapters = [NamedAdapter { name: "one".into(), adapter: Adapter::new(config, tensors.into()).unwrap() }];
        let scratch = tempfile::tempdir().unwrap();
        let options = FoldOptions::default();
        Ok(fold(&self.model(), scratch.path(), &adapters, options, scratch.path()).map_err(Box::new)?.0)
    }

    /// Folds a prefix, and finds the output to be the operator's own with the same keys and values before those that it is
    /// fed: `join` puts them there.
    fn sees_prefix(
        &self,
        library: &Path,
        label: &str,
        kv_heads: usize,
        join: impl Fn(&mut NamedValues, &ArrayD<f32>, &ArrayD<f32>),
    ) {
        let (key, value) = (numbers(71, &[kv_heads, PREFIX, DIM]) * 8.0, numbers(72, &[kv_heads, PREFIX, DIM]));
        let mut longer = self.feeds.clone();
        join(&mut longer, &key, &value);
        self.sees(library, label, (&key, &value), (self, &longer));
    }

    /// Folds a prefix, and finds the output to be that of a graph which is fed with the prefix before the tokens.
    fn sees(
        &self,
        library: &Path,
        label: &str,
        (key, value): (&ArrayD<f32>, &ArrayD<f32>),
        (judge, longer): (&Self, &NamedValues),
    ) {
        let folded = self.with_prefix(key.shape()[0], key, value).unwrap_or_else(|error| panic!("{label}: {error}"));
        let read = |model: &Model, feeds: &NamedValues| {
            let read = run(library, model, feeds).take("read").unwrap().into_f32().unwrap();
            if read.ndim() == 3 { heads_first(&read) } else { read.into_dimensionality().unwrap() }
        };
        let (found, plain) = (read(&folded, &self.feeds), read(&self.model(), &self.feeds));
        near(label, &found, &read(&judge.model(), longer));
        let moved = found.iter().zip(&plain).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
        assert!(moved > 0.05, "{label}: the prefix says nothing");
    }
}

/// Rows of the batch with a prefix before them on the time axis.
fn joined(feeds: &mut NamedValues, name: &str, axis: usize, prefix: &ArrayD<f32>) {
    let own = feeds.take(name).unwrap().into_f32().unwrap();
    let mut shape = own.shape().to_vec();
    shape[axis] = PREFIX;
    let rows = prefix.broadcast(shape).unwrap().to_owned();
    feeds.insert(name, concatenate(Axis(axis), &[rows.view(), own.view()]).unwrap());
}

fn run(library: &Path, model: &Model, feeds: &NamedValues) -> NamedValues {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("model.onnx");
    model.save(&path).unwrap();
    let options = OrtOptions { threads: Some(1), ..OrtOptions::default() };
    let mut session = OrtSession::open(library, &path, options).unwrap();
    // an input that only the operator read is not there in a graph without it
    let names: Vec<String> = session.inputs().iter().map(|port| port.name.clone()).collect();
    let feeds = feeds.clone().into_iter().filter(|(name, _)| names.contains(name)).collect();
    session.run(feeds).unwrap()
}

fn heads_first(merged: &ArrayD<f32>) -> Array4<f32> {
    let (batch, seq) = (merged.shape()[0], merged.shape()[1]);
    let split = merged.as_standard_layout().into_owned().into_shape_with_order((batch, seq, HEADS, DIM)).unwrap();
    split.permuted_axes([0, 2, 1, 3])
}

fn near(label: &str, found: &Array4<f32>, expected: &Array4<f32>) {
    assert_eq!(found.shape(), expected.shape(), "{label}");
    let most = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f32::max);
    assert!(most < 1e-5 && found.iter().all(|x| x.is_finite()), "{label}: {most:e}");
}

/// GroupQueryAttention on keys that are the queries.
#[derive(Clone)]
struct Grouped {
    label: &'static str,
    seq: usize,
    past: usize,
    /// `seqlens_k`, one a row.
    lengths: Vec<i32>,
    half: usize,
    interleaved: i64,
    packed: bool,
    position_ids: Option<Vec<i64>>,
    /// Whether the tables are constants, or come from nodes of which only the run tells the sizes.
    tables_known: bool,
}

impl Grouped {
    fn new(label: &'static str, seq: usize, past: usize, lengths: &[i32]) -> Self {
        let (half, interleaved, packed, tables_known) = (DIM / 2, 0, false, true);
        Self {
            label,
            seq,
            past,
            lengths: lengths.to_vec(),
            half,
            interleaved,
            packed,
            position_ids: None,
            tables_known,
        }
    }

    fn graph(&self, do_rotary: i64) -> Graph {
        let (batch, seq) = (self.lengths.len(), self.seq);
        let angles = ArrayD::from_shape_fn(vec![64, self.half], |i| i[0] as f32 * 0.7_f32.powi(i[1] as i32));
        let (query, value) = (numbers(1, &[batch, seq, WIDTH]), numbers(2, &[batch, seq, WIDTH]));
        let past = |seed| numbers(seed, &[batch, HEADS, self.past, DIM]);
        let packed = concatenate(Axis(2), &[query.view(), query.view(), value.view()]).unwrap();
        let total = (self.past + seq) as i32;
        let mut graph = Graph::default()
            .feed("past_key", past(3))
            .feed("past_value", past(4))
            .feed("lengths", ArrayD::from_shape_vec(vec![batch], self.lengths.clone()).unwrap())
            .feed("total", ArrayD::from_elem(vec![], total));
        graph = if self.packed {
            graph.feed("query", packed)
        } else {
            graph.feed("query", query.clone()).feed("key", query).feed("value", value)
        };
        let tables = [("cos", angles.mapv(f32::cos)), ("sin", angles.mapv(f32::sin))];
        for (name, table) in tables {
            graph = if self.tables_known { graph.constant(name, &table) } else { graph.feed(name, table) };
        }
        let positions = if let Some(ids) = &self.position_ids {
            graph = graph.feed("position_ids", ArrayD::from_shape_vec(vec![batch, seq], ids.clone()).unwrap());
            "position_ids"
        } else {
            ""
        };
        let (key, value) = if self.packed { ("", "") } else { ("key", "value") };
        let inputs = ["query", key, value, "past_key", "past_value", "lengths", "total", "cos", "sin", positions];
        graph.presents = vec!["present_key", "present_value"];
        graph.node(
            NodeDef::new("GroupQueryAttention", "attention")
                .domain(MICROSOFT)
                .inputs(inputs)
                .outputs(["output", "present_key", "present_value"])
                .attr_int("num_heads", HEADS as i64)
                .attr_int("kv_num_heads", HEADS as i64)
                .attr_int("do_rotary", do_rotary)
                .attr_int("rotary_interleaved", self.interleaved)
                .attr_float("softcap", 3.0)
                .attr_int("local_window_size", 4),
        )
    }

    /// The operator's own keys of the new tokens.
    fn own_keys(&self, library: &Path, graph: &Graph) -> Array4<f32> {
        let present = run(library, &graph.model(), &graph.feeds).take("present_key").unwrap().into_f32().unwrap();
        let mut keys = Array4::zeros((self.lengths.len(), HEADS, self.seq, DIM));
        for (row, length) in self.lengths.iter().enumerate() {
            let start = (*length + 1 - self.seq as i32).max(0) as usize;
            keys.slice_mut(s![row, .., .., ..]).assign(&present.slice(s![row, .., start..start + self.seq, ..]));
        }
        keys
    }
}

#[test]
fn the_query_beside_group_query_attention_is_the_one_inside() {
    let Some(library) = runtime() else { return };
    let prompt = Grouped::new("prompt", 4, 0, &[3, 3]);
    let decode = Grouped::new("decode", 1, 5, &[5, 3]);
    let chunk = Grouped::new("chunk", 3, 5, &[7]);
    let partial = |of: &Grouped, label| Grouped { label, half: DIM / 4, ..of.clone() };
    let packed = |of: &Grouped, label| Grouped { label, packed: true, ..of.clone() };
    let given = |of: &Grouped, label, ids: &[i64]| Grouped { label, position_ids: Some(ids.to_vec()), ..of.clone() };
    let cases = [
        prompt.clone(),
        decode.clone(),
        chunk.clone(),
        Grouped::new("prompt padded on the right", 4, 0, &[3, 1]),
        Grouped { label: "interleaved", interleaved: 1, ..prompt.clone() },
        partial(&prompt, "a part of each head turns"),
        partial(&packed(&decode, ""), "packed, a part turns, decode"),
        Grouped { interleaved: 1, ..partial(&packed(&prompt, ""), "packed, interleaved, a part turns") },
        packed(&prompt, "packed prompt"),
        packed(&chunk, "packed chunk"),
        given(&prompt, "a prompt counts on from the first position of the first row", &[7, 9, 11, 2, 20, 21, 22, 23]),
        given(&decode, "decode at given positions", &[9, 30]),
        given(&packed(&chunk, ""), "packed chunk at given positions", &[9, 2, 30]),
        Grouped { tables_known: false, ..partial(&prompt, "tables of unknown width") },
        Grouped { label: "tables of unknown width, all of a head", tables_known: false, ..decode },
    ];
    for case in cases {
        let graph = case.graph(1);
        let query = graph.query(&library, Query::PostRope);
        near(case.label, &query, &case.own_keys(&library, &graph));
        graph.carries(&library, case.label, &query);
        let still = case.graph(0);
        let unrotated = graph.query(&library, Query::PreRope);
        near(case.label, &unrotated, &still.query(&library, Query::PostRope));
        near(case.label, &unrotated, &case.own_keys(&library, &still));
        still.carries(&library, case.label, &unrotated);
    }
}

/// ONNX Runtime's CPU kernel has no norm inside, so the formula judges: `x / √(mean(x²) + ε) · weight` of each head.
#[test]
fn the_norm_inside_group_query_attention_is_made_beside_it_too() {
    let Some(library) = runtime() else { return };
    let case = Grouped { packed: true, ..Grouped::new("norm", 4, 0, &[3]) };
    let weight = numbers(8, &[DIM]);
    let with_norm = |do_rotary: i64| {
        let mut graph = case.graph(do_rotary).constant("q_norm", &weight).constant("k_norm", &weight);
        let node =
            graph.nodes.pop().unwrap().inputs(["", "", "", "", "q_norm", "k_norm"]).attr_float("qk_norm_epsilon", 0.1);
        graph.node(node)
    };
    let plain = case.graph(1).query(&library, Query::PreRope);
    let mean = plain.mapv(|x| x * x).mean_axis(Axis(3)).unwrap().insert_axis(Axis(3));
    let weight = weight.clone().into_shape_with_order(DIM).unwrap();
    let normed = &plain / &mean.mapv(|mean| (mean + 0.1).sqrt()) * &weight;
    near("normed", &with_norm(0).query(&library, Query::PostRope), &normed);
    near("normed, before its rotation", &with_norm(1).query(&library, Query::PreRope), &normed);
    // a rotation keeps the length of each pair
    let turned = with_norm(1).query(&library, Query::PostRope);
    let length = |x: &Array4<f32>| {
        let (left, right) = (x.slice(s![.., .., .., ..DIM / 2]), x.slice(s![.., .., .., DIM / 2..]));
        (&left * &left + &right * &right).to_owned()
    };
    near("turned", &length(&turned), &length(&normed));
    assert!(turned.iter().zip(&normed).any(|(t, n)| (t - n).abs() > 0.1));
}

#[test]
fn the_bias_inside_multi_head_attention_is_part_of_the_query() {
    let Some(library) = runtime() else { return };
    let (batch, seq, past) = (2, 3, 2);
    let query = numbers(1, &[batch, seq, WIDTH]);
    let half = numbers(5, &[WIDTH]);
    let bias = concatenate(Axis(0), &[half.view(), half.view(), numbers(6, &[WIDTH]).view()]).unwrap();
    for (label, has_bias, declared) in
        [("with bias", true, false), ("with bias, widths declared", true, true), ("without bias", false, false)]
    {
        let mut graph = Graph::default()
            .feed("query", query.clone())
            .feed("key", query.clone())
            .feed("value", numbers(2, &[batch, seq, WIDTH]))
            .feed("past_key", numbers(3, &[batch, HEADS, past, DIM]))
            .feed("past_value", numbers(4, &[batch, HEADS, past, DIM]))
            .constant("bias", &bias);
        graph.presents = vec!["present_key", "present_value"];
        graph.declared = declared;
        let bias = if has_bias { "bias" } else { "" };
        let graph = graph.node(
            NodeDef::new("MultiHeadAttention", "attention")
                .domain(MICROSOFT)
                .inputs(["query", "key", "value", bias, "", "", "past_key", "past_value"])
                .outputs(["output", "present_key", "present_value"])
                .attr_int("num_heads", HEADS as i64)
                .attr_int("unidirectional", 1)
                .attr_float("scale", 0.3),
        );
        let present = run(&library, &graph.model(), &graph.feeds).take("present_key").unwrap().into_f32().unwrap();
        let found = graph.query(&library, Query::PostRope);
        let own = present.slice(s![.., .., past.., ..]).to_owned().into_dimensionality().unwrap();
        near(label, &found, &own);
        graph.carries(&library, label, &found);
        graph.sees_prefix(&library, label, HEADS, |feeds, key, value| {
            joined(feeds, "past_key", 2, key);
            joined(feeds, "past_value", 2, value);
        });
    }
    // without a past it does not put out its keys; padding hides some
    let graph = Graph::default()
        .feed("query", query)
        .feed("key", numbers(7, &[batch, 4, WIDTH]))
        .feed("value", numbers(2, &[batch, 4, WIDTH]))
        .feed("mask", ndarray::arr2(&[[1i32, 1, 1, 1], [1, 1, 1, 0]]).into_dyn())
        .node(
            NodeDef::new("MultiHeadAttention", "attention")
                .domain(MICROSOFT)
                .inputs(["query", "key", "value", "", "mask"])
                .outputs(["output"])
                .attr_int("num_heads", HEADS as i64),
        );
    graph.sees_prefix(&library, "with a mask of keys", HEADS, |feeds, key, value| {
        for (name, prefix) in [("key", key), ("value", value)] {
            let by_token = prefix.clone().permuted_axes(vec![1, 0, 2]).as_standard_layout().into_owned();
            let merged = by_token.into_shape_with_order(vec![PREFIX, WIDTH]).unwrap();
            joined(feeds, name, 1, &merged);
        }
        feeds.insert("mask", ndarray::arr2(&[[1i32, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]]).into_dyn());
    });
}

/// ONNX Runtime's CPU kernels do not run these, so what the specification says is written out here.
#[test]
fn a_packed_query_is_the_first_of_three() {
    let Some(library) = runtime() else { return };
    let bias = numbers(5, &[3 * WIDTH]);
    let packed = |op: &str, shape: &[usize], slot: usize| {
        let inputs: Vec<&str> = (0..=slot)
            .map(|i| {
                if i == 0 {
                    "query"
                } else if i == slot {
                    "bias"
                } else {
                    ""
                }
            })
            .collect();
        Graph::default().feed("query", numbers(1, shape)).constant("bias", &bias).node(
            NodeDef::new(op, "attention")
                .domain(MICROSOFT)
                .inputs(inputs)
                .outputs(["output"])
                .attr_int("num_heads", HEADS as i64),
        )
    };
    let five = packed("MultiHeadAttention", &[2, 4, HEADS, 3, DIM], 3);
    let masked = packed("DecoderMaskedMultiHeadAttention", &[2, 1, 3 * WIDTH], 10);
    let x = numbers(1, &[2, 4, HEADS, 3, DIM]);
    let expected = Array4::from_shape_fn((2, HEADS, 4, DIM), |(b, h, t, i)| x[[b, t, h, 0, i]] + bias[[h * DIM + i]]);
    near("five dimensions", &five.query(&library, Query::PostRope), &expected);
    let x = numbers(1, &[2, 1, 3 * WIDTH]);
    let expected =
        Array4::from_shape_fn((2, HEADS, 1, DIM), |(b, h, _, i)| x[[b, 0, h * DIM + i]] + bias[[h * DIM + i]]);
    near("one token", &masked.query(&library, Query::PostRope), &expected);
}

#[test]
fn the_projection_inside_attention_of_onnx_runtime_is_made_once_more() {
    let Some(library) = runtime() else { return };
    let (batch, seq, past, wide) = (2, 3, 2, 24);
    let own = numbers(5, &[wide, WIDTH]);
    let weights = concatenate(Axis(1), &[own.view(), own.view(), numbers(6, &[wide, WIDTH]).view()]).unwrap();
    let half = numbers(7, &[WIDTH]);
    let bias = concatenate(Axis(0), &[half.view(), half.view(), numbers(8, &[WIDTH]).view()]).unwrap();
    for (label, sizes) in [("equal thirds", None), ("given sizes", Some([WIDTH as i64; 3]))] {
        let mut graph = Graph::default()
            .feed("x", numbers(1, &[batch, seq, wide]))
            .feed("past", numbers(3, &[2, batch, HEADS, past, DIM]))
            .constant("weights", &weights)
            .constant("bias", &bias);
        graph.presents = vec!["present"];
        let mut node = NodeDef::new("Attention", "attention")
            .domain(MICROSOFT)
            .inputs(["x", "weights", "bias", "", "past"])
            .outputs(["output", "present"])
            .attr_int("num_heads", HEADS as i64)
            .attr_int("unidirectional", 1);
        if let Some(sizes) = sizes {
            node = node.attr_ints("qkv_hidden_sizes", &sizes);
        }
        let graph = graph.node(node);
        let present = run(&library, &graph.model(), &graph.feeds).take("present").unwrap().into_f32().unwrap();
        let own = present.slice(s![0, .., .., past.., ..]).to_owned().into_dimensionality().unwrap();
        let found = graph.query(&library, Query::PostRope);
        near(label, &found, &own);
        near(label, &graph.query(&library, Query::PreRope), &own);
        graph.carries(&library, label, &found);
        graph.sees_prefix(&library, label, HEADS, |feeds, key, value| {
            let both = ndarray::stack(Axis(0), &[key.view(), value.view()]).unwrap().insert_axis(Axis(1));
            joined(feeds, "past", 3, &both);
        });
    }
}

/// Whole numbers that 8 or 4 bits hold.
fn whole(seed: usize, shape: &[usize], bits: i64) -> ArrayD<f32> {
    numbers(seed, shape).mapv(|x| (x * if bits == 8 { 100.0 } else { 7.0 }).round())
}

/// As a cache keeps them: those of 4 bits two by two, the first one in the low bits, and 8 too large.
fn kept(whole: &ArrayD<f32>, bits: i64) -> ArrayD<f32> {
    if bits == 8 {
        return whole.clone();
    }
    let axis = Axis(whole.ndim() - 1);
    let half = |first: isize| whole.slice_axis(axis, ndarray::Slice::new(first, None, 2)).mapv(|x| x + 8.0);
    half(0) + half(1) * 16.0
}

/// What a cache quantises is read again from what it puts out; a sink is a key that has no value.
#[test]
fn a_prefix_is_seen_beside_sinks_and_quantised_caches() {
    let Some(library) = runtime() else { return };
    let (seq, past) = (3, 2);
    let grouped = |inputs: [&str; 4]| {
        let inputs = ["query", "key", "value", inputs[0], inputs[1], "lengths", "total", "", "", "", "", inputs[2]]
            .into_iter()
            .chain([inputs[3], if inputs[3].is_empty() { "" } else { "value_scale" }]);
        NodeDef::new("GroupQueryAttention", "attention")
            .domain(MICROSOFT)
            .inputs(inputs)
            .outputs(["output", "present_key", "present_value"])
            .attr_int("num_heads", HEADS as i64)
            .attr_int("kv_num_heads", HEADS as i64)
    };
    let graph = |past_key: ArrayD<f32>, past_value: ArrayD<f32>| {
        let total = (past + seq) as i32;
        Graph::default()
            .feed("query", numbers(1, &[1, seq, WIDTH]))
            .feed("key", numbers(2, &[1, seq, WIDTH]))
            .feed("value", numbers(3, &[1, seq, WIDTH]))
            .feed("past_key", past_key)
            .feed("past_value", past_value)
            .feed("lengths", ArrayD::from_elem(vec![1], total - 1))
            .feed("total", ArrayD::from_elem(vec![], total))
    };
    let counted = |feeds: &mut NamedValues| {
        let total = (past + PREFIX + seq) as i32;
        feeds.insert("lengths", ArrayD::from_elem(vec![1], total - 1));
        feeds.insert("total", ArrayD::from_elem(vec![], total));
    };
    let of_past = |seed| numbers(seed, &[1, HEADS, past, DIM]);
    for (label, sinks, node) in [
        ("sinks", "sinks", grouped(["past_key", "past_value", "sinks", ""])),
        ("smooth softmax", "", grouped(["past_key", "past_value", "", ""]).attr_int("smooth_softmax", 1)),
    ] {
        let mut graph = graph(of_past(4), of_past(5));
        if !sinks.is_empty() {
            graph = graph.constant(sinks, &(numbers(6, &[HEADS]) * 3.0));
        }
        graph.node(node).sees_prefix(&library, label, HEADS, |feeds, key, value| {
            joined(feeds, "past_key", 2, key);
            joined(feeds, "past_value", 2, value);
            counted(feeds);
        });
    }
    for (bits, by_channel) in [(8, false), (8, true), (4, false), (4, true)] {
        let label = format!("{bits} bits, by channel: {by_channel}");
        let step = if bits == 8 { 0.03 } else { 0.4 };
        let scale = |seed: usize| match by_channel {
            true => numbers(seed, &[1, HEADS, 1, DIM]).mapv(|x| step * (1.0 + x.abs())),
            false => ArrayD::from_elem(vec![1], step),
        };
        let prefix = |seed: usize| whole(seed, &[HEADS, PREFIX, DIM], bits);
        let of_prefix = |seed: usize, scale: &ArrayD<f32>| {
            let rows = prefix(seed).insert_axis(Axis(0)) * scale;
            rows.index_axis_move(Axis(0), 0)
        };
        let of_past = |seed: usize| kept(&whole(seed, &[1, HEADS, past, DIM], bits), bits);
        let (key_scale, value_scale) = (scale(8), scale(9));
        let (data_type, kind) = match (bits, by_channel) {
            (8, true) => (DataType::Int8, "PER_CHANNEL"),
            (8, false) => (DataType::Int8, "PER_TENSOR"),
            (_, true) => (DataType::Uint8, "PER_CHANNEL"),
            (_, false) => (DataType::Uint8, "PER_TENSOR"),
        };
        let cast = |from: &str, to: &str| {
            NodeDef::new("Cast", to).attr_int("to", data_type.code().into()).inputs([from]).outputs([to])
        };
        let node = grouped(["kept_key", "kept_value", "", "key_scale"]).attr_int("kv_cache_bit_width", bits);
        let node = node.attr_string("k_quant_type", kind).attr_string("v_quant_type", kind);
        let graph = graph(of_past(4), of_past(5)).constant("key_scale", &key_scale);
        let graph = graph.constant("value_scale", &value_scale);
        let graph = graph.node(cast("past_key", "kept_key")).node(cast("past_value", "kept_value")).node(node);
        let mut longer = graph.feeds.clone();
        joined(&mut longer, "past_key", 2, &kept(&prefix(71), bits));
        joined(&mut longer, "past_value", 2, &kept(&prefix(72), bits));
        counted(&mut longer);
        let (key, value) = (of_prefix(71, &key_scale), of_prefix(72, &value_scale));
        graph.sees(&library, &label, (&key, &value), (&graph, &longer));
    }
}

/// Where rows end, where they begin too, and which keys each query sees.
#[test]
fn a_prefix_is_seen_beside_every_kind_of_mask() {
    let Some(library) = runtime() else { return };
    let (batch, seq, total) = (2, 3, 4);
    let key = numbers(71, &[HEADS, PREFIX, DIM]) * 8.0;
    let value = numbers(72, &[HEADS, PREFIX, DIM]);
    let rows = |mask: &[i32], shape: &[usize]| ArrayD::from_shape_vec(shape.to_vec(), mask.to_vec()).unwrap();
    let graph = |mask: ArrayD<i32>| {
        Graph::default()
            .feed("query", numbers(1, &[batch, seq, WIDTH]))
            .feed("key", numbers(7, &[batch, total, WIDTH]))
            .feed("value", numbers(2, &[batch, total, WIDTH]))
            .feed("mask", mask)
            .node(
                NodeDef::new("MultiHeadAttention", "attention")
                    .domain(MICROSOFT)
                    .inputs(["query", "key", "value", "", "mask"])
                    .outputs(["output"])
                    .attr_int("num_heads", HEADS as i64),
            )
    };
    let longer = |mask: ArrayD<i32>| {
        let mut feeds = graph(mask).feeds;
        for (name, prefix) in [("key", &key), ("value", &value)] {
            let by_token = prefix.clone().permuted_axes(vec![1, 0, 2]).as_standard_layout().into_owned();
            joined(&mut feeds, name, 1, &by_token.into_shape_with_order(vec![PREFIX, WIDTH]).unwrap());
        }
        feeds
    };
    let pairs = ArrayD::from_shape_fn(vec![batch, seq, total], |at| i32::from((at[0] + at[1] * 3 + at[2]) % 4 != 0));
    let ones = ArrayD::ones(vec![batch, seq, PREFIX]);
    let longer_pairs = concatenate(Axis(2), &[ones.view(), pairs.view()]).unwrap();
    let ends = rows(&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], &[batch, PREFIX + total]);
    let both = rows(&[1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0], &[batch, PREFIX + total]);
    let cases = [
        ("ends", rows(&[4, 1], &[2]), ends.clone()),
        ("ends, and where packed rows begin", rows(&[4, 1, 0, 3, 6, 0, 4, 8], &[8]), ends),
        ("each query's", pairs, longer_pairs),
    ];
    for (label, mask, judged) in cases {
        let judge = graph(judged.clone());
        graph(mask).sees(&library, label, (&key, &value), (&judge, &longer(judged)));
    }
    let projecting = |mask: ArrayD<i32>, past: &[Option<&ArrayD<f32>>]| {
        let mut graph = Graph::default()
            .feed("x", numbers(1, &[batch, seq, 24]))
            .feed("past", numbers(3, &[2, batch, HEADS, 1, DIM]))
            .feed("mask", mask)
            .constant("weights", &numbers(5, &[24, 3 * WIDTH]))
            .constant("bias", &numbers(7, &[3 * WIDTH]));
        if let [Some(key), Some(value)] = past {
            let both = ndarray::stack(Axis(0), &[key.view(), value.view()]).unwrap().insert_axis(Axis(1));
            joined(&mut graph.feeds, "past", 3, &both);
        }
        let node = NodeDef::new("Attention", "attention").domain(MICROSOFT).attr_int("num_heads", HEADS as i64);
        let node = node.attr_int("unidirectional", 1).inputs(["x", "weights", "bias", "mask", "past"]);
        graph.node(node.outputs(["output", "present"]))
    };
    let ends = rows(&[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0], &[batch, PREFIX + total]);
    for (label, mask, judged) in
        [("ends", rows(&[4, 3], &[2]), ends), ("beginnings and ends", rows(&[4, 3, 1, 2], &[4]), both)]
    {
        let judge = projecting(judged, &[Some(&key), Some(&value)]);
        projecting(mask, &[]).sees(&library, label, (&key, &value), (&judge, &judge.feeds));
    }
}

/// Without a past, queries and keys begin together; with lengths, a row's queries stand at its end.
#[test]
fn a_prefix_is_seen_beside_the_standard_attention_s_own_masks() {
    let Some(library) = runtime() else { return };
    let (batch, seq, total) = (2, 3, 5);
    let lengths = [5_usize, 4];
    let (key, value) = (numbers(71, &[HEADS, PREFIX, DIM]) * 8.0, numbers(72, &[HEADS, PREFIX, DIM]));
    let base = || Graph {
        newest: true,
        ..Graph::default()
            .feed("query", numbers(1, &[batch, HEADS, seq, DIM]))
            .feed("key", numbers(2, &[batch, HEADS, total, DIM]))
            .feed("value", numbers(3, &[batch, HEADS, total, DIM]))
    };
    let node = |inputs: &[&str], causal: i64| {
        let node = NodeDef::new("Attention", "attention").inputs(inputs.iter().copied()).outputs(["output"]);
        node.attr_int("is_causal", causal)
    };
    for (label, causal, has_lengths) in [("causal", 1, false), ("lengths", 0, true), ("causal, lengths", 1, true)] {
        let (mut graph, mut inputs) = (base(), vec!["query", "key", "value"]);
        if has_lengths {
            graph = graph.feed("lengths", ArrayD::from_shape_fn(vec![batch], |row| lengths[row[0]] as i64));
            inputs.extend(["", "", "", "lengths"]);
        }
        let graph = graph.node(node(&inputs, causal));
        let mask = ArrayD::from_shape_fn(vec![batch, 1, seq, PREFIX + total], |at| {
            let (row, query, column) = (at[0], at[2], at[3]);
            let Some(column) = column.checked_sub(PREFIX) else { return 0.0_f32 };
            let end = if has_lengths { lengths[row] } else { total };
            let first = if has_lengths { end - seq } else { 0 };
            if column < end && (causal == 0 || column <= first + query) { 0.0 } else { -1e30 }
        });
        let mut judge = base().feed("mask", mask).node(node(&["query", "key", "value", "mask"], 0));
        joined(&mut judge.feeds, "key", 2, &key);
        joined(&mut judge.feeds, "value", 2, &value);
        graph.sees(&library, label, (&key, &value), (&judge, &judge.feeds));
    }
}

/// A block of standard operators: a table of which key each query sees, sinks in a column of their own, and the largest score
/// taken off all of them; or another mask that is fed.
fn block(mask: Option<&ArrayD<f32>>, window: usize) -> Graph {
    let (batch, seq) = (2, 5);
    let mut graph = Graph::default()
        .feed("query", numbers(1, &[batch, HEADS, seq, DIM]))
        .feed("key", numbers(2, &[batch, HEADS, seq, DIM]))
        .feed("value", numbers(3, &[batch, HEADS, seq, DIM]))
        .constant("scale", &ArrayD::from_elem(vec![], 0.3))
        .constant("low", &ArrayD::from_elem(vec![], -1e30))
        .constant("sinks", &numbers(4, &[batch, HEADS, seq, 1]));
    let table = (0..8 * 8_usize).map(|at| u8::from(at % 8 <= at / 8 && at / 8 - at % 8 < window)).collect();
    graph.constants.push(TensorDef::inline("table", DataType::Bool, &[1, 1, 8, 8], table));
    for (name, values) in [("from", &[0, 0][..]), ("to", &[5, 5]), ("axes", &[2, 3])] {
        graph.constants.push(TensorDef::from_i64s(name, &[2], values));
    }
    graph.constants.push(TensorDef::from_i64s("merged", &[3], &[0, 0, WIDTH as i64]));
    for (name, value) in [("first", 0), ("end", -1), ("last", 3)] {
        graph.constants.push(TensorDef::from_i64s(name, &[1], &[value]));
    }
    let node = |op: &str, inputs: &[&str], output: &str| {
        NodeDef::new(op, output).inputs(inputs.iter().copied()).outputs([output])
    };
    graph = graph
        .node(node("Transpose", &["key"], "turned").attr_ints("perm", &[0, 1, 3, 2]))
        .node(node("MatMul", &["query", "turned"], "product"))
        .node(node("Mul", &["product", "scale"], "scaled"));
    graph = match mask {
        Some(mask) => graph.feed("mask", mask.clone()).node(node("Add", &["scaled", "mask"], "masked")),
        None => graph.node(node("Slice", &["table", "from", "to", "axes"], "seen")).node(node(
            "Where",
            &["seen", "scaled", "low"],
            "masked",
        )),
    };
    graph
        .node(node("Concat", &["masked", "sinks"], "joined").attr_int("axis", 3))
        .node(node("ReduceMax", &["joined", "last"], "most"))
        .node(node("Sub", &["joined", "most"], "shifted"))
        .node(node("Softmax", &["shifted"], "weights").attr_int("axis", -1))
        .node(node("Slice", &["weights", "first", "end", "last"], "kept"))
        .node(node("MatMul", &["kept", "value"], "mixed"))
        .node(node("Transpose", &["mixed"], "by_token").attr_ints("perm", &[0, 2, 1, 3]))
        .node(node("Reshape", &["by_token", "merged"], "output"))
}

#[test]
fn a_prefix_is_seen_in_a_block_with_sinks_and_a_table_of_its_window() {
    let Some(library) = runtime() else { return };
    let (key, value) = (numbers(71, &[HEADS, PREFIX, DIM]) * 8.0, numbers(72, &[HEADS, PREFIX, DIM]));
    for window in [3, 8] {
        let mask = ArrayD::from_shape_fn(vec![1, 1, 5, PREFIX + 5], |at| {
            let (query, column) = (at[2] + PREFIX, at[3]);
            if column <= query && query - column < window { 0.0_f32 } else { -1e30 }
        });
        let mut judge = block(Some(&mask), window);
        joined(&mut judge.feeds, "key", 2, &key);
        joined(&mut judge.feeds, "value", 2, &value);
        let label = format!("window of {window}");
        block(None, window).sees(&library, &label, (&key, &value), (&judge, &judge.feeds));
    }
}

#[test]
fn a_prefix_beside_a_bias_that_is_no_mask_is_refused() {
    let prefix = numbers(7, &[HEADS, PREFIX, DIM]);
    let refused = |bias: Vec<NodeDef>, constants: &[(&str, ArrayD<f32>)]| {
        let mut graph = block(None, 8);
        for (name, value) in constants {
            graph = graph.constant(name, value);
        }
        let at = graph.nodes.iter().position(|node| node.name() == "masked").unwrap();
        graph.nodes.splice(at..=at, bias);
        graph.with_prefix(HEADS, &prefix, &prefix).unwrap_err().to_string()
    };
    let node = |op: &str, inputs: [&str; 2], output: &str| NodeDef::new(op, output).inputs(inputs).outputs([output]);
    let of_heads = vec![node("Mul", ["slopes", "distances"], "bias"), node("Add", ["scaled", "bias"], "masked")];
    let error = refused(of_heads, &[("slopes", numbers(8, &[HEADS, 1, 1])), ("distances", numbers(9, &[1, 5]))]);
    assert!(error.contains("each head adds a bias of its own, as ALiBi does (`bias`)"), "{error}");
    let of_tokens = vec![node("MatMul", ["value", "projection"], "bias"), node("Add", ["scaled", "bias"], "masked")];
    let error = refused(of_tokens, &[("projection", numbers(8, &[DIM, 5]))]);
    assert!(error.contains("a bias is added that is computed from the tokens (`bias`)"), "{error}");
}

/// Only GPU kernels of ONNX Runtime turn inside this operator, so the formula judges: halves, frequencies of base 10,000, a prompt
/// from zero on, tokens after a past all where it ends.
#[test]
fn the_rotation_inside_attention_of_onnx_runtime_is_made_beside_it() {
    let Some(library) = runtime() else { return };
    let cases: [(&str, usize, usize, &[usize]); 4] = [
        ("prompt", DIM, 0, &[0, 1, 2, 3]),
        ("a part of each head turns", DIM / 2, 0, &[0, 1, 2]),
        ("decode", DIM, 5, &[5]),
        ("two after a past", DIM / 2, 5, &[5, 5]),
    ];
    for (label, turning, past, positions) in cases {
        let graph = Graph::default()
            .feed("x", numbers(1, &[2, positions.len(), 20]))
            .feed("past", numbers(2, &[2, 2, HEADS, past, DIM]))
            .constant("weights", &numbers(3, &[20, 3 * WIDTH]))
            .constant("bias", &numbers(4, &[3 * WIDTH]));
        let node = NodeDef::new("Attention", "attention").domain(MICROSOFT).attr_int("num_heads", HEADS as i64);
        let node = node.attr_int("do_rotary", 1).attr_int("rotary_embedding_dim", turning as i64);
        let graph = graph.node(node.inputs(["x", "weights", "bias", "", "past"]).outputs(["output"]));
        let plain = graph.query(&library, Query::PreRope);
        let mut expected = plain.clone();
        for ((b, h, t, i), x) in expected.indexed_iter_mut().filter(|((_, _, _, i), _)| *i < turning) {
            let half = turning / 2;
            let angle = positions[t] as f64 / 10_000_f64.powf(2.0 * (i % half) as f64 / turning as f64);
            let other = if i < half { -plain[[b, h, t, i + half]] } else { plain[[b, h, t, i - half]] };
            *x = (f64::from(plain[[b, h, t, i]]) * angle.cos() + f64::from(other) * angle.sin()) as f32;
        }
        near(label, &graph.query(&library, Query::PostRope), &expected);
    }
}

/// Query, keys and values that were turned apart, side by side for an operator that does not turn; and packed ones that are only
/// scaled.
#[test]
fn the_query_before_a_rotation_is_found_among_packed_parts() {
    let Some(library) = runtime() else { return };
    let case = Grouped { packed: true, ..Grouped::new("packed", 4, 0, &[3]) };
    let packed = |nodes: Vec<NodeDef>| {
        let mut graph = case.graph(0);
        let operator = graph.nodes.pop().unwrap();
        graph.feeds.take("query").unwrap();
        for (seed, name) in ["q", "k", "v"].into_iter().enumerate() {
            graph = graph.feed(name, numbers(seed, &[1, 4, WIDTH]));
        }
        let positions = ArrayD::from_shape_fn(vec![1, 4], |at| at[1] as i64 + 3);
        graph = graph.feed("positions", positions).constant("half", &ArrayD::from_elem(vec![], 0.5));
        nodes.into_iter().chain([operator]).fold(graph, Graph::node)
    };
    let rotary = |from: &str, to: &str| {
        let node = NodeDef::new("RotaryEmbedding", to).domain(MICROSOFT).attr_int("num_heads", HEADS as i64);
        node.attr_int("rotary_embedding_dim", DIM as i64).inputs([from, "positions", "cos", "sin"]).outputs([to])
    };
    let concat =
        |parts: [&str; 3], to: &str| NodeDef::new("Concat", to).attr_int("axis", -1).inputs(parts).outputs([to]);
    let turned = packed(vec![rotary("q", "qr"), rotary("k", "kr"), concat(["qr", "kr", "v"], "query")]);
    near("turned", &turned.query(&library, Query::PreRope), &heads_first(&numbers(0, &[1, 4, WIDTH])));
    turned.carries(&library, "turned", &turned.query(&library, Query::PostRope));
    // what comes from a product with weights, and is only scaled, is its own
    let mut weights = ArrayD::zeros(vec![WIDTH, 3 * WIDTH]);
    (0..3 * WIDTH).for_each(|column| weights[[column % WIDTH, column]] = 1.0);
    let product = NodeDef::new("MatMul", "qkv").inputs(["q", "weights"]).outputs(["product"]);
    let scaled = NodeDef::new("Mul", "scale").inputs(["product", "half"]).outputs(["query"]);
    let scaled = packed(vec![product, scaled]).constant("weights", &weights);
    near(
        "scaled",
        &scaled.query(&library, Query::PreRope),
        &heads_first(&numbers(0, &[1, 4, WIDTH]).mapv(|x| x / 2.0)),
    );
}

/// Three dimensions with their heads merged, or four; past, present, soft cap and grouped heads.
#[test]
fn the_standard_attention_carries_a_term_in_both_layouts() {
    let Some(library) = runtime() else { return };
    let (batch, seq, past) = (2, 3, 2);
    for (label, merged, kv_heads) in [("3-D", true, HEADS), ("3-D, shared heads", true, 1), ("4-D", false, HEADS)] {
        let shape = |heads: usize| if merged { vec![batch, seq, heads * DIM] } else { vec![batch, heads, seq, DIM] };
        let mut graph = Graph::default()
            .feed("query", numbers(1, &shape(HEADS)))
            .feed("key", numbers(2, &shape(kv_heads)))
            .feed("value", numbers(3, &shape(kv_heads)))
            .feed("past_key", numbers(4, &[batch, kv_heads, past, DIM]))
            .feed("past_value", numbers(5, &[batch, kv_heads, past, DIM]));
        graph.presents = vec!["present_key", "present_value"];
        // onnx infers a width of zero for an output of three dimensions where its input's width is not known
        graph.declared = true;
        let mut node = NodeDef::new("Attention", "attention")
            .inputs(["query", "key", "value", "", "past_key", "past_value"])
            .outputs(["output", "present_key", "present_value"])
            .attr_int("is_causal", 1)
            .attr_float("scale", 0.4);
        if merged {
            node = node.attr_int("q_num_heads", HEADS as i64).attr_int("kv_num_heads", kv_heads as i64);
        }
        let uncapped = Graph { feeds: graph.feeds.clone(), presents: graph.presents.clone(), ..Graph::default() };
        let uncapped = Graph { declared: true, ..uncapped }.node(node.clone());
        uncapped.sees_prefix(&library, label, kv_heads, |feeds, key, value| {
            joined(feeds, "past_key", 2, key);
            joined(feeds, "past_value", 2, value);
        });
        let graph = graph.node(node.attr_float("softcap", 2.0));
        let prefix = numbers(7, &[kv_heads, PREFIX, DIM]);
        let error = graph.with_prefix(kv_heads, &prefix, &prefix).unwrap_err();
        assert!(error.to_string().contains("its soft cap comes before its mask"), "{error}");
        let query = numbers(1, &shape(HEADS));
        let query = if merged { heads_first(&query) } else { query.into_dimensionality().unwrap() };
        near(label, &graph.query(&library, Query::PostRope), &query);
        graph.carries(&library, label, &query);
    }
}

/// A rotation by an operator is found behind views, and where it turns a part of each head.
#[test]
fn the_query_before_a_rotation_by_an_operator_is_found() {
    let Some(library) = runtime() else { return };
    let (batch, seq) = (2, 3);
    let x = numbers(1, &[batch, seq, WIDTH]);
    let table =
        |f: fn(f32) -> f32| ArrayD::from_shape_fn(vec![8, DIM / 2], |i| f(i[0] as f32 * 0.5_f32.powi(i[1] as i32)));
    let positions = ArrayD::from_shape_fn(vec![batch, seq], |i| (i[0] + i[1]) as i64);
    let base = || {
        Graph::default()
            .feed("x", x.clone())
            .feed("key", numbers(2, &[batch, HEADS, seq, DIM]))
            .feed("value", numbers(3, &[batch, HEADS, seq, DIM]))
            .feed("positions", positions.clone())
            .constant("cos", &table(f32::cos))
            .constant("sin", &table(f32::sin))
    };
    let views = |graph: Graph, from: &str, to: &str| {
        let mut graph = graph;
        let shape = format!("{to}_shape");
        graph.constants.push(TensorDef::from_i64s(shape.as_str(), &[4], &[0, 0, HEADS as i64, DIM as i64]));
        let split = format!("{to}_split");
        graph
            .node(NodeDef::new("Reshape", split.as_str()).inputs([from, &shape]).outputs([split.as_str()]))
            .node(NodeDef::new("Transpose", to).inputs([split.as_str()]).outputs([to]).attr_ints("perm", &[0, 2, 1, 3]))
    };
    let attention = NodeDef::new("Attention", "attention").inputs(["query", "key", "value"]).outputs(["output"]);
    let rotary = |from: &str, to: &str| {
        let node = NodeDef::new("RotaryEmbedding", "rotary").domain(MICROSOFT).attr_int("num_heads", HEADS as i64);
        node.attr_int("rotary_embedding_dim", DIM as i64).inputs([from, "positions", "cos", "sin"]).outputs([to])
    };
    let after_views = views(base(), "x", "split").node(rotary("split", "query")).node(attention.clone());
    let before_views = views(base().node(rotary("x", "turned")), "turned", "query").node(attention.clone());
    let standard = NodeDef::new("RotaryEmbedding", "rotary").attr_int("num_heads", HEADS as i64);
    let standard = standard.inputs(["x", "cos", "sin", "positions"]).outputs(["turned"]);
    let of_the_standard = views(base().node(standard), "turned", "query").node(attention);
    for (label, graph) in
        [("after views", after_views), ("before views", before_views), ("of the standard", of_the_standard)]
    {
        near(label, &graph.query(&library, Query::PreRope), &heads_first(&x));
        let turned = graph.query(&library, Query::PostRope);
        assert!(turned.iter().zip(&heads_first(&x)).any(|(t, x)| (t - x).abs() > 0.1), "{label}");
        graph.carries(&library, label, &turned);
    }
}

/// Half of each head turns, written out in standard operators as exporters do, before `ai.onnx` Attention.
#[test]
fn the_query_before_a_partial_rotation_of_standard_operators_is_found() {
    let Some(library) = runtime() else { return };
    let (seq, part) = (3, DIM as i64 / 2);
    let shape = [2, HEADS, seq, DIM];
    let angles = ArrayD::from_shape_fn(vec![seq, DIM / 2], |i| i[0] as f32 * 0.7_f32.powi((i[1] % (DIM / 4)) as i32));
    let mut graph = Graph::default()
        .feed("x", numbers(1, &shape))
        .feed("key", numbers(2, &shape))
        .feed("value", numbers(3, &shape))
        .constant("cos", &angles.mapv(f32::cos))
        .constant("sin", &angles.mapv(f32::sin));
    for (name, value) in [("zero", 0), ("quarter", part / 2), ("half", part), ("end", i64::MAX), ("last", 3)] {
        graph.constants.push(TensorDef::from_i64s(name, &[1], &[value]));
    }
    let slice = |name: &str, of: &str, from: &str, to: &str| {
        NodeDef::new("Slice", name).inputs([of, from, to, "last"]).outputs([name])
    };
    let pair = |op: &str, name: &str, inputs: [&str; 2]| {
        let node = NodeDef::new(op, name).inputs(inputs).outputs([name]);
        if op == "Concat" { node.attr_int("axis", -1) } else { node }
    };
    let graph = graph
        .node(slice("turning", "x", "zero", "half"))
        .node(slice("kept", "x", "half", "end"))
        .node(pair("Mul", "by_cos", ["turning", "cos"]))
        .node(slice("left", "turning", "zero", "quarter"))
        .node(slice("right", "turning", "quarter", "end"))
        .node(NodeDef::new("Neg", "negated").inputs(["right"]).outputs(["negated"]))
        .node(pair("Concat", "exchanged", ["negated", "left"]))
        .node(pair("Mul", "by_sin", ["exchanged", "sin"]))
        .node(pair("Add", "turned", ["by_cos", "by_sin"]))
        .node(pair("Concat", "query", ["turned", "kept"]))
        .node(NodeDef::new("Attention", "attention").inputs(["query", "key", "value"]).outputs(["output"]));
    let x: Array4<f32> = numbers(1, &shape).into_dimensionality().unwrap();
    near("partial", &graph.query(&library, Query::PreRope), &x);
    let turned = graph.query(&library, Query::PostRope);
    assert!(turned.iter().zip(&x).any(|(t, x)| (t - x).abs() > 0.1));
    graph.carries(&library, "partial", &turned);
}

#[test]
fn what_an_operator_lacks_is_said() {
    let refused = |node: NodeDef, wanted: Query| {
        let mut builder = ModelBuilder::new("g", 10);
        builder.opset("", 23).opset(MICROSOFT, 1);
        for name in ["x", "key", "value"] {
            builder.input(ValueDef::new(name, DataType::Float, [Dim::Unknown, Dim::Unknown, Dim::Unknown]));
        }
        builder.initializer(TensorDef::from_f32s("weights", &[2, 6], &[0.0; 12]));
        builder.node(node.outputs(["output"]));
        builder.node(NodeDef::new("Identity", "o_proj").inputs(["output"]).outputs(["read"]));
        builder.output(ValueDef::new("read", DataType::Float, []));
        let model = builder.build().unwrap();
        match locate::sites(&model) {
            Ok(sites) => locate::query(&model, &sites[0], wanted).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    };
    let microsoft = |op: &str| NodeDef::new(op, "attn").domain(MICROSOFT);
    let grouped = || microsoft("GroupQueryAttention").attr_int("num_heads", 4).attr_int("kv_num_heads", 2);
    let cases = [
        (grouped().inputs(["x", "key"]), "it has one of key and value"),
        (microsoft("GroupQueryAttention").inputs(["x"]), "it lacks num_heads or kv_num_heads"),
        (
            microsoft("GroupQueryAttention").attr_int("num_heads", 4).attr_int("kv_num_heads", 3).inputs(["x"]),
            "4 heads cannot share 3 key-value heads",
        ),
        (grouped().attr_int("do_rotary", 1).inputs(["x"]), "rotates (do_rotary = 1), but has no cos_cache"),
        (NodeDef::new("Attention", "attn").inputs(["x", "key", "value"]), "q_num_heads is not set"),
        (microsoft("MultiHeadAttention").inputs(["x", "key", "value"]), "it has no num_heads"),
        (
            microsoft("MultiHeadAttention").attr_int("num_heads", 2).inputs(["x"]),
            "its query has 3 dimensions, where 5 are expected",
        ),
        (
            microsoft("Attention").attr_int("num_heads", 4).inputs(["x", "weights"]),
            "how many columns of `weights` are the query's",
        ),
        (
            microsoft("Attention")
                .attr_int("num_heads", 2)
                .attr_ints("qkv_hidden_sizes", &[2, 2, 4])
                .inputs(["x", "weights"]),
            "2 wide together in the query, but 4 in the output",
        ),
        (
            microsoft("Attention")
                .attr_int("num_heads", 2)
                .attr_int("do_rotary", 1)
                .attr_int("rotary_embedding_dim", 32)
                .inputs(["x", "weights"]),
            "rotary_embedding_dim is 32, and its heads are",
        ),
        (
            microsoft("SparseAttention").inputs(["x"]),
            "how SparseAttention of com.microsoft lays out its query is not known",
        ),
    ];
    for (node, reason) in cases {
        let error = refused(node, Query::PostRope);
        assert!(error.starts_with("the attention around node `attn` cannot carry an adapter: "), "{error}");
        assert!(error.contains(reason), "{error}");
    }
    let error = refused(grouped().inputs(["x"]), Query::PreRope);
    assert!(error.contains("behind nodes that may have rotated them"), "{error}");
    let biased = microsoft("MultiHeadAttention").attr_int("num_heads", 2).inputs(["x", "key", "value", "weights"]);
    assert!(refused(biased, Query::PreRope).contains("gets its bias inside"));
}
