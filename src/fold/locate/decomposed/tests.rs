//! Blocks as one or another exporter writes them, each a change to the same plain one.

use super::*;
use crate::adapter::Query;
use crate::fold::locate;
use crate::onnx::{DataType, Dim, Model, ModelBuilder, NodeDef, TensorDef, ValueDef};

/// A node's operator, inputs and output; its name is its output's.
type Part<'a> = (&'a str, &'a [&'a str], &'a str);

fn node((op, inputs, output): Part) -> NodeDef {
    let (op, domain) =
        op.split_once('.').map_or((op, ""), |(domain, op)| (op, if domain == "ms" { MICROSOFT } else { domain }));
    let (op, attributes) = op.split_once(' ').unwrap_or((op, ""));
    let mut def = NodeDef::new(op, output).domain(domain).inputs(inputs.iter().copied()).outputs([output]);
    for attribute in attributes.split(' ').filter(|text| !text.is_empty()) {
        let (name, value) = attribute.split_once('=').unwrap();
        def = match (name, value.parse::<i64>()) {
            ("perm", _) => def.attr_ints(name, &value.bytes().map(|b| i64::from(b - b'0')).collect::<Vec<_>>()),
            (_, Ok(value)) => def.attr_int(name, value),
            (_, Err(_)) => def.attr_float(name, value.parse().unwrap()),
        };
    }
    def
}

/// A model of these nodes over q, k, v `[batch, heads, seq, head_dim]`, a mask and some constants.
fn model(parts: &[Part]) -> Model {
    let mut builder = ModelBuilder::new("g", 8);
    builder.opset("", 17).opset(MICROSOFT, 1).opset("other", 1);
    for (name, rank) in [
        ("q", 4),
        ("k", 4),
        ("v", 4),
        ("mask", 4),
        ("q3", 3),
        ("k3", 3),
        ("v3", 3),
        ("q5", 5),
        ("past_key_values.1.key", 4),
    ] {
        builder.input(ValueDef::new(name, DataType::Float, (0..rank).map(|_| Dim::Unknown)));
    }
    let constant = |name: &str, values: &[i64]| TensorDef::from_i64s(name, &[values.len() as i64], values);
    builder.initializer(TensorDef::from_f32s("scale", &[], &[0.5]));
    builder.initializer(TensorDef::from_f32s("halves", &[4], &[0.5; 4]));
    builder.initializer(TensorDef::from_f32s("gamma", &[4], &[0.5, 0.25, 1.0, 2.0]));
    builder.input(ValueDef::new("fed", DataType::Float, [])).initializer(TensorDef::from_f32s("fed", &[], &[0.5]));
    builder.initializer(TensorDef::from_f32s("w", &[8, 8], &[0.0; 64]));
    builder.initializer(constant("merged", &[0, 0, 8])).initializer(constant("split", &[0, 0, 2, 4]));
    builder.initializer(constant("rest", &[0, 0, -1]));
    builder.initializer(constant("four", &[1, 2, 3, 4])).initializer(constant("five", &[1, 2, 1, 3, 4]));
    builder
        .initializer(constant("one", &[1]))
        .initializer(constant("last", &[3]))
        .initializer(constant("flat", &[0, 2, 4]));
    builder.output(ValueDef::new("out", DataType::Float, (0..3).map(|_| Dim::Unknown)));
    parts.iter().for_each(|part| _ = builder.node(node(*part)));
    builder.build().unwrap()
}

/// From the softmax's output to that of the block.
const TAIL: [Part; 4] = [
    ("MatMul", &["p", "v"], "o"),
    ("Transpose perm=0213", &["o"], "t"),
    ("Reshape", &["t", "merged"], "m"),
    ("MatMul", &["m", "w"], "out"),
];

fn found(parts: &[&[Part]]) -> Site {
    let sites = locate::sites(&model(&parts.concat())).unwrap();
    assert_eq!(sites.len(), 1);
    sites.into_iter().next().unwrap()
}

fn stops(parts: &[&[Part]]) -> String {
    locate::sites(&model(&parts.concat())).unwrap_err().to_string()
}

fn is(site: &Site, query: &str, output: &str) {
    assert_eq!((site.query.as_str(), site.output.as_str()), (query, output));
    assert_eq!((site.query_layout, site.output_layout, site.width), (Layout::HeadsFirst, Layout::HeadsFirst, Some(8)));
}

#[test]
fn a_scale_may_stand_anywhere() {
    let after: &[Part] = &[("MatMul", &["q", "k"], "s"), ("Div", &["s", "scale"], "d"), ("Softmax", &["d"], "p")];
    is(&found(&[after, &TAIL]), "q", "o");
    let before: &[Part] = &[("Mul", &["scale", "q"], "qs"), ("MatMul", &["qs", "k"], "s"), ("Softmax", &["s"], "p")];
    is(&found(&[before, &TAIL]), "q", "o");
    // on both sides, its root of a root of a dimension
    let derived: &[Part] = &[
        ("Shape", &["q"], "shape"),
        ("Slice", &["shape", "last", "four"], "dim"),
        ("Cast to=1", &["dim"], "float"),
        ("Sqrt", &["float"], "root"),
        ("Div", &["scale", "root"], "factor"),
        ("Sqrt", &["factor"], "half"),
        ("Mul", &["q", "half"], "qs"),
        ("Mul", &["k", "half"], "ks"),
        ("MatMul", &["qs", "ks"], "s"),
        ("Softmax", &["s"], "p"),
    ];
    is(&found(&[derived, &TAIL]), "q", "o");
    let absorbed: &[Part] = &[("ms.FusedMatMul alpha=0.25 transB=1", &["q", "k"], "s"), ("Softmax", &["s"], "p")];
    is(&found(&[absorbed, &TAIL]), "q", "o");
    // before the heads are laid out
    let early: &[Part] = &[
        ("Mul", &["q3", "scale"], "qs"),
        ("Reshape", &["qs", "split"], "qr"),
        ("Transpose perm=0213", &["qr"], "qt"),
        ("MatMul", &["qt", "k"], "s"),
        ("Softmax", &["s"], "p"),
    ];
    let site = found(&[early, &TAIL]);
    assert_eq!((site.query.as_str(), site.query_layout), ("q3", Layout::Merged));
}

#[test]
fn masks_caps_guards_and_casts_are_passed() {
    let capped: &[Part] = &[
        ("MatMul", &["q", "k"], "s"),
        ("Mul", &["s", "scale"], "a"),
        ("Tanh", &["a"], "b"),
        ("Mul", &["b", "scale"], "c"),
        ("Add", &["mask", "c"], "d"),
        ("Cast to=1", &["d"], "e"),
        ("Softmax", &["e"], "f"),
        ("Cast to=1", &["f"], "p"),
    ];
    is(&found(&[capped, &TAIL]), "q", "o");
    let guarded: &[Part] = &[
        ("MatMul", &["q", "k"], "s"),
        ("Cast to=9", &["mask"], "bool"),
        ("Where", &["bool", "s", "scale"], "a"),
        ("Softmax", &["a"], "f"),
        ("IsNaN", &["f"], "nan"),
        ("Where", &["nan", "scale", "f"], "p"),
    ];
    is(&found(&[guarded, &TAIL]), "q", "o");
}

#[test]
fn products_of_three_and_five_dimensions_are_laid_out() {
    let flat: &[Part] = &[
        ("Reshape", &["q", "flat"], "qf"),
        ("MatMul", &["qf", "k3"], "s"),
        ("Softmax", &["s"], "p"),
        ("MatMul", &["p", "v3"], "of"),
        ("Reshape", &["of", "four"], "o"),
    ];
    is(&found(&[flat, &TAIL[1..]]), "q", "o");
    let grouped: &[Part] = &[
        ("Reshape", &["q", "five"], "qg"),
        ("MatMul", &["qg", "k"], "s"),
        ("Softmax", &["s"], "p"),
        ("MatMul", &["p", "v"], "og"),
        ("Reshape", &["og", "four"], "o"),
    ];
    is(&found(&[grouped, &TAIL[1..]]), "q", "o");
    // heads put behind the sequence at once
    let direct: &[Part] = &[
        ("Reshape", &["q", "five"], "qg"),
        ("MatMul", &["qg", "k"], "s"),
        ("Softmax", &["s"], "p"),
        ("MatMul", &["p", "v"], "og"),
        ("Transpose perm=03124", &["og"], "t"),
    ];
    let site = found(&[direct, &TAIL[2..]]);
    assert_eq!((site.output.as_str(), site.output_layout), ("m", Layout::Merged));
}

#[test]
fn what_is_not_known_is_named() {
    let scores: &[Part] = &[("MatMul", &["q", "k"], "s"), ("Softmax", &["s"], "p")];
    let error = stops(&[scores, &TAIL[..1], &[("Transpose perm=1203", &["o"], "t")], &TAIL[2..]]);
    assert!(
        error.ends_with("`m` (Reshape) turns its output [heads, seq, batch, head_dim] into what is not known"),
        "{error}"
    );
    let error = stops(&[&scores[..1], &[("Softmax", &["s"], "x"), ("Softplus", &["x"], "p")], &TAIL]);
    assert!(
        error.contains("around node `x`")
            && error.ends_with("`p` (Softplus) stands between the softmax and the values"),
        "{error}"
    );
    let transposed: &[Part] = &[("ms.FusedMatMul transA=1", &["q", "k"], "s"), ("Softmax", &["s"], "p")];
    assert!(stops(&[transposed, &TAIL]).ends_with("`s` transposes its left operand (transA = 1)"));
    let two: &[Part] = &[
        ("MatMul", &["q", "k"], "s"),
        ("MatMul", &["q", "v"], "r"),
        ("Add", &["s", "r"], "a"),
        ("Softmax", &["a"], "p"),
    ];
    assert!(stops(&[two, &TAIL]).contains("its scores are the sum of two products"));
    // a router's softmax is no attention
    let router: &[Part] = &[("MatMul", &["q3", "w"], "s"), ("Softmax", &["s"], "out")];
    assert!(stops(&[router]).contains("holds no attention"));
}

#[test]
fn explain_says_how_far_a_match_got() {
    let scores: &[Part] = &[("MatMul", &["q", "k"], "s"), ("Softmax", &["s"], "x"), ("Softplus", &["x"], "p")];
    let blocks = locate::explain(&model(&[scores, &TAIL].concat()));
    assert_eq!(blocks.len(), 1);
    assert_eq!(blocks[0].matched, ["scores: node `s` (MatMul)", "query: `q`"]);
    assert_eq!(blocks[0].stopped.as_deref(), Some("`p` (Softplus) stands between the softmax and the values"));
    assert!(blocks[0].site.is_none());
}

#[test]
fn layers_are_one_each_and_those_of_their_caches() {
    let second = |query: &'static str| -> Vec<Part<'static>> {
        let q: &'static [&'static str] = if query == "q" { &["q", "k"] } else { &["r", "k"] };
        vec![
            ("Reshape", &["y", "four"], "r"),
            ("MatMul", q, "s2"),
            ("Softmax", &["s2"], "p2"),
            ("MatMul", &["p2", "v"], "o2"),
            ("Transpose perm=0213", &["o2"], "t2"),
            ("Reshape", &["t2", "merged"], "out"),
        ]
    };
    let first: &[Part] = &[
        ("MatMul", &["q", "k"], "s"),
        ("Softmax", &["s"], "p"),
        ("MatMul", &["p", "v"], "o"),
        ("Transpose perm=0213", &["o"], "t"),
        ("Reshape", &["t", "merged"], "y"),
    ];
    let sites = locate::sites(&model(&[first, &second("r")].concat())).unwrap();
    assert_eq!(sites.iter().map(|site| (site.layer, site.output.as_str())).collect::<Vec<_>>(), [(0, "o"), (1, "o2")]);
    let error = stops(&[first, &second("q")]);
    assert_eq!(error, "in the main graph, `p` and `p2` are both the attention of layer 0: neither reads the other");
    let cached: &[Part] =
        &[("Add", &["past_key_values.1.key", "k"], "kc"), ("MatMul", &["q", "kc"], "s"), ("Softmax", &["s"], "p")];
    let error = stops(&[cached, &TAIL]);
    assert_eq!(
        error,
        "in the main graph, `p` is number 0 in the flow of data and reads the cache of layer 1: the attention of layer 0 was not found"
    );
}

/// A scale is found behind products whose dimensions only their operator tells, and where nothing tells them, its query is not
/// taken for the unscaled one.
#[test]
fn a_scale_behind_a_layout_that_is_not_told_is_seen() {
    let behind = |product: &'static str| -> Vec<Part<'static>> {
        vec![
            (product, &["q3", "w"], "proj"),
            ("Mul", &["proj", "scale"], "qs"),
            ("Reshape", &["qs", "split"], "qr"),
            ("Transpose perm=0213", &["qr"], "qt"),
            ("MatMul", &["qt", "k"], "s"),
            ("Softmax", &["s"], "p"),
        ]
    };
    for product in ["MatMul", "ms.MatMulNBits", "ms.MatMulBnb4", "MatMulInteger", "ms.DynamicQuantizeMatMul"] {
        let site = found(&[&behind(product), &TAIL]);
        assert_eq!((site.query.as_str(), site.query_layout), ("proj", Layout::Merged), "{product}");
    }
    let stopped = stops(&[&behind("other.Product"), &TAIL]);
    assert!(stopped.ends_with("its query `proj` lies as [dimensions that the graph does not tell]"), "{stopped}");
    // without a scale there is nothing to be found behind
    let plain: &[Part] = &[
        ("other.Product", &["q3", "w"], "proj"),
        ("Reshape", &["proj", "split"], "qr"),
        ("Transpose perm=0213", &["qr"], "qt"),
        ("MatMul", &["qt", "k"], "s"),
        ("Softmax", &["s"], "p"),
    ];
    is(&found(&[plain, &TAIL]), "qt", "o");
}

/// Numbers that exporters compute, or write out for every element.
#[test]
fn a_scale_is_a_number_however_it_is_made() {
    let of = |made: &[Part]| {
        let block: &[Part] = &[("Mul", &["q", "by"], "qs"), ("MatMul", &["qs", "k"], "s"), ("Softmax", &["s"], "p")];
        locate::sites(&model(&[made, block, &TAIL].concat()))
            .map(|sites| sites[0].query.clone())
            .map_err(|e| e.to_string())
    };
    for made in [
        &[("CastLike", &["scale", "q"] as &[&str], "by")] as &[Part],
        &[("Expand", &["scale", "four"], "by")],
        &[("Shape", &["q"], "d"), ("Expand", &["scale", "d"], "by")],
        &[("Exp", &["scale"], "e"), ("Max", &["e", "scale"], "by")],
        &[("Sum", &["scale", "scale"], "by")],
        &[("Identity", &["halves"], "by")],
        &[("Size", &["q"], "n"), ("Cast to=1", &["n"], "by")],
    ] {
        assert_eq!(of(made), Ok("q".to_owned()), "{made:?}");
    }
    // weights of a norm, and what depends on positions, are the query's own
    assert_eq!(of(&[("Identity", &["gamma"], "by")]), Ok("qs".to_owned()));
    assert_eq!(of(&[("Cos", &["mask"], "by")]), Ok("qs".to_owned()));
    // what is a number and was not found out is not taken for either
    let error = of(&[("Det", &["scale"], "by")]).unwrap_err();
    assert!(error.ends_with("`qs` (Mul) may scale its query: what `by` is was not found out"), "{error}");
}

/// An initializer that is an input too, as all are before IR version 4, is a number as well.
#[test]
fn a_scale_may_be_an_input_with_a_default() {
    let block: &[Part] = &[("Mul", &["q", "fed"], "qs"), ("MatMul", &["qs", "k"], "s"), ("Softmax", &["s"], "p")];
    is(&found(&[block, &TAIL]), "q", "o");
}

#[test]
fn what_hides_a_scale_is_named() {
    for hides in [("Neg", &["qs"] as &[&str], "x"), ("Clip", &["qs"], "x"), ("Add", &["qs", "scale"], "x")] {
        let block: &[Part] =
            &[("Mul", &["q", "scale"], "qs"), hides, ("MatMul", &["x", "k"], "s"), ("Softmax", &["s"], "p")];
        let error = stops(&[block, &TAIL]);
        assert!(error.ends_with(&format!("`x` ({}) changes its query behind its scale", hides.0)), "{error}");
        let unscaled: &[Part] =
            &[(hides.0, &["q", "scale"], "x"), ("MatMul", &["x", "k"], "s"), ("Softmax", &["s"], "p")];
        is(&found(&[unscaled, &TAIL]), "x", "o");
    }
}

/// What is rotated is scaled then, and no query before the scale is rotated.
#[test]
fn a_scale_before_the_rotation_alone_is_refused() {
    let rotated = |source: &'static str, scores: &'static str| -> Vec<Part<'static>> {
        vec![
            ("Mul", &["q", "scale"], "qs"),
            ("Cos", &["mask"], "cos"),
            ("Sin", &["mask"], "sin"),
            ("Identity", if source == "qs" { &["qs"] } else { &["q"] }, "x"),
            ("Neg", &["x"], "turned"),
            ("Mul", &["x", "cos"], "a"),
            ("Mul", &["turned", "sin"], "b"),
            ("Add", &["a", "b"], "r"),
            ("MatMul", &["r", "k"], "s"),
            ("Add", &["s", "mask"], "masked"),
            ("Mul", &["masked", "scale"], "again"),
            ("Softmax", if scores == "again" { &["again"] } else { &["masked"] }, "p"),
        ]
    };
    let error = stops(&[&rotated("qs", "masked"), &TAIL]);
    assert!(error.ends_with("its query is scaled before it is rotated, and nowhere after"), "{error}");
    is(&found(&[&rotated("qs", "again"), &TAIL]), "r", "o");
    is(&found(&[&rotated("q", "masked"), &TAIL]), "r", "o");
}

/// Before an operator too.
#[test]
fn a_scale_before_an_operator_is_not_overlooked() {
    let before = |product: &'static str| -> Vec<Part<'static>> {
        vec![
            (product, &["q3", "w"], "proj"),
            ("Mul", &["proj", "scale"], "qs"),
            ("Reshape", &["qs", "split"], "qr"),
            ("Transpose perm=0213", &["qr"], "qt"),
            ("Attention", &["qt", "k", "v"], "o"),
            ("Transpose perm=0213", &["o"], "t"),
            ("Reshape", &["t", "merged"], "m"),
            ("MatMul", &["m", "w"], "out"),
        ]
    };
    let site = found(&[&before("ms.MatMulNBits")]);
    assert_eq!((site.query.as_str(), site.query_layout), ("proj", Layout::Merged));
    let stopped = stops(&[&before("other.Product")]);
    assert!(stopped.ends_with(
        "its query is scaled before it, and behind the scale `proj` lies as [dimensions that the graph does not tell]"
    ));
}

/// A quantiser on both sides of the Transpose leaves no float that is not rounded but the one before it.
#[test]
fn a_query_that_is_rounded_before_its_heads_are_put_first_is_turned_beside() {
    let quantised: &[Part] = &[
        ("Reshape", &["q3", "split"], "qr"),
        ("Add", &["qr", "qr"], "rotated"),
        ("QuantizeLinear", &["rotated", "scale"], "r8"),
        ("DequantizeLinear", &["r8", "scale"], "rd"),
        ("Transpose perm=0213", &["rd"], "t4"),
        ("QuantizeLinear", &["t4", "scale"], "t8"),
        ("DequantizeLinear", &["t8", "scale"], "td"),
        ("MatMul", &["td", "k"], "s"),
        ("Softmax", &["s"], "p"),
    ];
    let model = model(&[quantised, &TAIL].concat());
    let site = &locate::sites(&model).unwrap()[0];
    assert_eq!((site.query.as_str(), site.query_layout), ("rotated", Layout::SeqFirst));
    let source = locate::query(&model, site, Query::PostRope).unwrap();
    assert_eq!((source.layout, source.nodes.len(), source.made_of()), (Layout::HeadsFirst, 1, "rotated"));
    assert_eq!(source.nodes[0].op_type(), "Transpose");
}

/// Pairs of a static quantiser on every edge: the query is the one before them, and the term comes behind all of them.
#[test]
fn a_term_is_not_cut_off_by_quantisers() {
    let quantised: &[Part] = &[
        ("QuantizeLinear", &["q", "scale"], "q8"),
        ("DequantizeLinear", &["q8", "scale"], "qd"),
        ("MatMul", &["qd", "k"], "s"),
        ("QuantizeLinear", &["s", "scale"], "s8"),
        ("DequantizeLinear", &["s8", "scale"], "sd"),
        ("Softmax", &["sd"], "p"),
        ("QuantizeLinear", &["p", "scale"], "p8"),
        ("DequantizeLinear", &["p8", "scale"], "pd"),
        ("MatMul", &["pd", "v"], "o"),
        ("QuantizeLinear", &["o", "scale"], "o8"),
        ("DequantizeLinear", &["o8", "scale"], "od"),
        ("Transpose perm=0213", &["od"], "t"),
        ("Reshape", &["t", "merged"], "m"),
        ("QuantizeLinear", &["m", "scale"], "m8"),
        ("DequantizeLinear", &["m8", "scale"], "md"),
        ("MatMul", &["md", "w"], "out"),
    ];
    let site = found(&[quantised]);
    assert_eq!((site.query.as_str(), site.query_layout), ("q", Layout::HeadsFirst));
    assert_eq!((site.output.as_str(), site.output_layout, site.readers.len()), ("md", Layout::Merged, 1));
}

/// A Reshape to `[0, 0, -1]` does not say it, the weights of the output projection do: in integers too, and behind quantisers.
#[test]
fn the_output_projection_tells_the_width() {
    let of = |projection: &[Part]| {
        let merged = [("Transpose perm=0213", &["o"] as &[&str], "t"), ("Reshape", &["t", "rest"], "m")];
        let block = [("MatMul", &["q", "kt"] as &[&str], "s"), ("Softmax", &["s"], "p"), ("MatMul", &["p", "v"], "o")];
        let keys = [("Transpose perm=0132", &["k"] as &[&str], "kt")];
        found(&[&keys, &block, &merged, projection]).width
    };
    assert_eq!(of(&[("MatMul", &["m", "w"], "out")]), Some(8));
    assert_eq!(of(&[("DynamicQuantizeLinear", &["m"], "i"), ("MatMulInteger", &["i", "w"], "out")]), Some(8));
    assert_eq!(of(&[("ms.DynamicQuantizeMatMul", &["m", "w", "scale"], "out")]), Some(8));
    let quantised = [
        ("QuantizeLinear", &["m", "scale"] as &[&str], "i"),
        ("DequantizeLinear", &["i", "scale"], "d"),
        ("DequantizeLinear", &["w", "scale"], "wd"),
        ("MatMul", &["d", "wd"], "out"),
    ];
    assert_eq!(of(&quantised), Some(8));
    assert_eq!(of(&[("MatMul", &["m", "mask"], "out")]), None);
}

#[test]
fn attention_in_integers_is_named() {
    let products: &[Part] = &[
        ("QLinearMatMul", &["q", "scale", "scale", "k"], "s"),
        ("DequantizeLinear", &["s"], "d"),
        ("Softmax", &["d"], "p"),
    ];
    let expected =
        "the attention around node `p` cannot carry an adapter: it computes in integers: `s` (QLinearMatMul)";
    assert_eq!(stops(&[products, &TAIL]), expected);
    let softmax: &[Part] = &[("MatMul", &["q", "k"], "s"), ("ms.QLinearSoftmax", &["s"], "p")];
    assert!(stops(&[softmax, &TAIL]).ends_with("it computes in integers: `p` (QLinearSoftmax)"));
}
