//! The check against sessions that are right, and wrong on purpose.

use std::path::Path;

use candle_core::{DType, Device};

use super::*;
use crate::adapter::Adapter;
use crate::base::{Checkpoint, Decoder, Linear, WeightRole};
use crate::parity::testing::{
    self, Candle, CandleSession, Distort, FAITHFUL, SHIFTED, Tampered, UNMASKED, candidate, check, tiny_adapter,
    tiny_decoder,
};
use crate::parity::{Case, NoOpPair};
use crate::runtime::{OrtOptions, OrtSession, TractOptions, TractSession};

fn report(check: Check) -> Report {
    check.report(Facts { command: "prefold verify".into(), ..Facts::default() }).unwrap()
}

fn failures(report: &Report) -> Vec<&str> {
    report.rows().iter().filter_map(|row| row.failure).collect()
}

fn tiny_session(adapter: Option<&Adapter>, distort: Distort) -> CandleSession {
    CandleSession::new(tiny_decoder(DType::F32), adapter, distort)
}

fn in_tiny(adapter: Option<&Adapter>, session: impl Session + 'static) -> Report {
    let mut check = check(tiny_decoder, adapter);
    check.run(candidate(session));
    report(check)
}

#[test]
fn the_same_model_passes_with_and_without_an_adapter() {
    for adapter in [None, Some(&tiny_adapter(0.3))] {
        let report = in_tiny(adapter, tiny_session(adapter, FAITHFUL));
        assert_eq!((report.verdict, failures(&report)), (Verdict::Pass, vec![]));
        assert_eq!(report.runs[0].cases.len(), 9);
        for case in &report.runs[0].cases {
            let greedy = case.greedy.as_ref().unwrap();
            assert_eq!(greedy.run, greedy.reference, "{}", case.case);
        }
    }
}

#[test]
fn a_missing_adapter_is_told() {
    let report = in_tiny(Some(&tiny_adapter(0.3)), tiny_session(None, FAITHFUL));
    assert_eq!((report.verdict, failures(&report).len()), (Verdict::Fail, 9));
    let message = failures(&report)[0];
    assert!(message.contains("away from the reference") && message.contains("is allowed"), "{message}");
}

/// The base model's scores see only differences of positions, an adapter's term the positions themselves.
#[test]
fn shifted_positions_are_told_by_an_adapter_alone() {
    assert_eq!(in_tiny(None, tiny_session(None, SHIFTED)).verdict, Verdict::Pass);
    let adapter = tiny_adapter(0.3);
    let report = in_tiny(Some(&adapter), tiny_session(Some(&adapter), SHIFTED));
    assert_eq!((report.verdict, failures(&report).len()), (Verdict::Fail, 9));
}

/// Padding after a row is hidden by causality, whatever the mask says.
#[test]
fn an_ignored_mask_is_told_by_padding_on_the_left_alone() {
    let report = in_tiny(None, tiny_session(None, UNMASKED));
    let failed = report.runs[0].cases.iter().filter(|case| !case.verdict.passed());
    let failed: Vec<&str> = failed.map(|case| case.case.as_str()).collect();
    assert_eq!(failed, ["left_padding", "cached_decode_left_padding"]);
}

#[test]
fn one_weight_a_thousandth_off_is_told() {
    for role in [WeightRole::Embedding, WeightRole::Weight(1, Linear::Down), WeightRole::FinalNorm] {
        let weight = |weight: &crate::base::WeightShape| {
            let tensor = testing::tiny_weight(weight, DType::F32)?;
            Ok(if weight.role == role { testing::perturbed(tensor, 1e-3) } else { tensor })
        };
        let decoder = Decoder::from_weights(&testing::tiny_spec(), weight).unwrap();
        let report = in_tiny(None, CandleSession::new(decoder, None, FAITHFUL));
        assert_eq!(report.verdict, Verdict::Fail, "{role:?}");
    }
}

#[test]
fn logits_that_are_not_finite_fail_and_are_named() {
    for (poison, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let change = move |_: &str, logits: &mut ndarray::ArrayD<f32>| logits[[0, 0, 3]] = poison;
        let report = in_tiny(None, Tampered { inner: tiny_session(None, FAITHFUL), change });
        let case = &report.runs[0].cases[0];
        assert_eq!((report.verdict, case.verdict, &case.figures), (Verdict::Fail, Verdict::Fail, &None));
        let expected = format!("the logit {name} for token 3 at row 0, column 0 is not finite");
        assert_eq!(case.failure.as_deref(), Some(expected.as_str()));
        report.to_json().unwrap();
    }
}

/// Padding is not compared: a graph may give what it likes there.
#[test]
fn padding_is_not_compared() {
    let mut check = check(tiny_decoder, None);
    let change = |_: &str, logits: &mut ndarray::ArrayD<f32>| {
        if logits.shape()[0] > 1 {
            logits[[1, 0, 3]] = f32::NAN;
        }
    };
    check.run(candidate(Tampered { inner: tiny_session(None, FAITHFUL), change }));
    let report = report(check);
    let verdict = |name: &str| report.runs[0].cases.iter().find(|case| case.case == name).unwrap().verdict;
    assert_eq!(verdict("left_padding"), Verdict::Pass, "row 1 starts with padding");
    assert_eq!(verdict("right_padding"), Verdict::Fail, "row 1 starts with its first token");
}

/// Each pick is moved to a token that is further away than a tie, without any logit moving by more than is allowed.
#[test]
fn another_greedy_token_fails_although_the_distance_is_allowed() {
    let mut check = check(tiny_decoder, None);
    for case in &mut check.cases {
        case.allowance.allowed = 0.3;
    }
    let change = |_: &str, logits: &mut ndarray::ArrayD<f32>| {
        for mut position in logits.lanes_mut(ndarray::Axis(2)) {
            let best = position.iter().copied().fold(f32::MIN, f32::max);
            position.mapv_inplace(|logit| if best - logit < 0.31 { logit - 0.29 } else { logit + 0.29 });
        }
    };
    check.run(candidate(Tampered { inner: tiny_session(None, FAITHFUL), change }));
    let report = report(check);
    for case in &report.runs[0].cases {
        assert!(case.figures.unwrap().max_abs < case.allowed);
        let greedy = case.greedy.as_ref().unwrap();
        assert!(!greedy.agrees && greedy.differences.iter().all(|difference| !difference.tie), "{greedy:?}");
        let message = case.failure.as_deref().unwrap();
        assert!(message.starts_with("row 0 picks token") && message.contains("at step 0 and the reference"));
    }
}

#[test]
fn a_runtime_that_fails_is_a_failed_row_and_an_absent_one_tells_nothing() {
    let mut check = check(tiny_decoder, None);
    let open: Open<'_> = Box::new(|| Err(runtime::Error::NoLibrary { tried: Vec::new() }));
    assert_eq!(check.run(Candidate { name: "absent".into(), open }), Verdict::Unknown);
    let mut spec = testing::tiny_spec();
    spec.vocab_size = 41;
    let other = Decoder::from_weights(&spec, |weight| testing::tiny_weight(weight, DType::F32)).unwrap();
    check.run(candidate(CandleSession::new(other, None, FAITHFUL)));
    assert_eq!(check.run(candidate(tiny_session(None, FAITHFUL))), Verdict::Pass);
    let report = report(check);
    assert_eq!(report.verdict, Verdict::Fail);
    let rows = report.rows();
    assert_eq!((rows[0].run, rows[0].case), ("absent", "load"));
    assert!(rows[0].failure.unwrap().contains("no usable ONNX Runtime library"));
    assert!(rows[1].failure.unwrap().contains("the logits are [1, 12, 41]"), "{:?}", rows[1]);
    assert_eq!(rows.len(), 1 + 9 + 9);
}

#[test]
fn what_cannot_be_judged_is_an_error() {
    assert!(matches!(check(tiny_decoder, None).report(Facts::default()), Err(Error::Nothing)));

    let broken = |weight: &crate::base::WeightShape| {
        let tensor = testing::tiny_weight(weight, DType::F64)?;
        Ok(if weight.role == WeightRole::FinalNorm { testing::perturbed(tensor, f64::NAN) } else { tensor })
    };
    let broken = Candle::new(Decoder::from_weights(&testing::tiny_spec(), broken).unwrap(), None);
    let error = Reference::compute(broken.model(), testing::cases(&testing::tiny_spec())).unwrap_err();
    assert!(matches!(&error, Error::Reference { case, .. } if case == "single_row"), "{error}");

    let model = Candle::new(tiny_decoder(DType::F64), None);
    let foreign = vec![Case::row("foreign", &[40], 0).unwrap()];
    assert!(matches!(Reference::compute(model.model(), foreign), Err(Error::Base(_))));
    let long = vec![Case::row("long", &[1; 65], 0).unwrap()];
    assert!(matches!(Reference::compute(model.model(), long), Err(Error::Case { .. })));

    let reference = Reference::compute(model.model(), testing::cases(&testing::tiny_spec())).unwrap();
    let mut spec = testing::tiny_spec();
    spec.norm.epsilon = 1e-6;
    let other = Decoder::from_weights(&spec, |weight| testing::tiny_weight(weight, DType::F32)).unwrap();
    let other = Candle::new(other, None);
    let budget = Budget::of(DType::F32, &spec).unwrap();
    assert!(matches!(Check::new(reference, other.model(), budget), Err(Error::Option { option: "model", .. })));
}

#[test]
fn a_report_is_what_its_schema_says_and_reads_back() {
    let mut check = check(tiny_decoder, None);
    check.run(candidate(tiny_session(None, FAITHFUL)));
    check.run(candidate(tiny_session(Some(&tiny_adapter(0.3)), FAITHFUL)));
    let open: Open<'_> = Box::new(|| Err(runtime::Error::NoLibrary { tried: Vec::new() }));
    check.run(Candidate { name: "absent".into(), open });
    check.no_op(no_op_pair(|_, _| {}));
    let report = report(check);
    let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
    let schema = serde_json::to_value(schemars::schema_for!(Report)).unwrap();
    let errors: Vec<String> =
        jsonschema::validator_for(&schema).unwrap().iter_errors(&json).map(|error| error.to_string()).collect();
    assert_eq!(errors, Vec::<String>::new());
    assert_eq!(serde_json::from_value::<Report>(json).unwrap(), report);
}

fn no_op_pair(change: impl FnMut(&str, &mut ndarray::ArrayD<f32>) + Send + 'static) -> NoOpPair<'static> {
    NoOpPair {
        name: "test".into(),
        base: Box::new(|| Ok(Box::new(tiny_session(None, FAITHFUL)))),
        folded: Box::new(|| Ok(Box::new(Tampered { inner: tiny_session(Some(&tiny_adapter(0.0)), FAITHFUL), change }))),
    }
}

#[test]
fn a_zero_adapter_changes_nothing_or_the_first_bit_is_named() {
    let mut check = check(tiny_decoder, None);
    assert_eq!(check.no_op(no_op_pair(|_, _| {})), Verdict::Pass);
    let last_bit = |_: &str, logits: &mut ndarray::ArrayD<f32>| {
        if logits.shape()[..2] == [3, 12] {
            logits[[1, 2, 3]] = logits[[1, 2, 3]].next_up();
        }
    };
    assert_eq!(check.no_op(no_op_pair(last_bit)), Verdict::Fail);
    let report = report(check);
    assert_eq!(report.verdict, Verdict::Fail);
    // Three prefills without steps, one of one token, four with four steps, one of three pieces with four steps.
    assert_eq!(report.no_op[0].tensors, 4 + 4 * 5 + (3 + 4));
    let found = report.no_op[1].first_difference.as_ref().unwrap();
    assert_eq!((found.case.as_str(), found.call, found.output.as_str()), ("left_padding", 0, "logits"));
    assert_eq!(found.index, [1, 2, 3]);
}

#[test]
fn the_stated_version_is_the_locked_one() {
    let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).unwrap();
    assert!(lock.contains(&format!("name = \"candle-core\"\nversion = \"{CANDLE_VERSION}\"")));
}

/// A graph that another exporter wrote, and the checkpoint that it was written from.
struct Exported {
    graph: std::path::PathBuf,
    checkpoint: Checkpoint,
    adapter: Adapter,
    library: Option<std::path::PathBuf>,
}

impl Exported {
    fn open(name: &str) -> Option<Self> {
        let graph = testing::shared(&format!("graphs/optimum_with_past/{name}/model.onnx"))?;
        let oracle = testing::shared(&format!("oracles/{name}"))?;
        let checkpoint = Checkpoint::open(&oracle).unwrap();
        let adapter = Adapter::open(&oracle.join("adapter.safetensors")).unwrap();
        Some(Self { graph, checkpoint, adapter, library: testing::ort_library() })
    }

    fn decoder(&self, dtype: DType) -> Decoder {
        Decoder::load(&self.checkpoint, dtype, &Device::Cpu).unwrap()
    }

    fn opens(&self) -> Vec<(&'static str, Open<'_>)> {
        let mut opens: Vec<(&'static str, Open<'_>)> = vec![("tract", tract(&self.graph))];
        if let Some(library) = &self.library {
            let open = || Ok(Box::new(OrtSession::open(library, &self.graph, OrtOptions::default())?) as Box<_>);
            opens.push(("onnxruntime", Box::new(open)));
        }
        opens
    }

    /// The graph in every runtime against the check's reference.
    fn judge(&self, mut check: Check) -> Report {
        for (name, open) in self.opens() {
            check.run(Candidate { name: name.into(), open });
        }
        report(check)
    }
}

fn tract(graph: &Path) -> Open<'_> {
    Box::new(move || Ok(Box::new(TractSession::open(graph, TractOptions::default())?)))
}

#[test]
fn exported_graphs_pass_as_they_are_and_fail_against_another_function() {
    for name in ["llama_gqa", "llama_mha"] {
        let Some(exported) = Exported::open(name) else { return };
        let faithful = exported.judge(check(|dtype| exported.decoder(dtype), None));
        assert_eq!(failures(&faithful), Vec::<&str>::new(), "{name}");
        assert_eq!(faithful.verdict, Verdict::Pass);
        for run in &faithful.runs {
            assert_eq!(run.runtime.as_ref().unwrap().runtime, run.name);
            for case in &run.cases {
                let figures = case.figures.unwrap();
                eprintln!("{name} {} {}: {:.2e} of {:.2e}", run.name, case.case, figures.max_abs, case.allowed);
                assert!(figures.max_abs > 0.0 && figures.kl_max < 1e-9, "{figures:?}");
            }
        }

        let adapted = exported.judge(check(|dtype| exported.decoder(dtype), Some(&exported.adapter)));
        for case in adapted.runs.iter().flat_map(|run| &run.cases) {
            let figures = case.figures.unwrap();
            assert_eq!(case.verdict, Verdict::Fail, "{name} {}", case.case);
            assert!(figures.max_abs > 0.1 && case.factor.unwrap() > 1e3, "{name} {}: {figures:?}", case.case);
        }

        let role = WeightRole::Weight(0, Linear::Value);
        let off = |dtype| {
            let weight = |weight: &crate::base::WeightShape| {
                let action = crate::base::Error::candle("converting a weight");
                let tensor = exported.checkpoint.weight(weight.role)?.to_dtype(dtype).map_err(action)?;
                Ok(if weight.role == role { testing::perturbed(tensor, 1e-3) } else { tensor })
            };
            Decoder::from_weights(exported.checkpoint.spec(), weight).unwrap()
        };
        let perturbed = exported.judge(check(off, None));
        assert!(perturbed.runs.iter().all(|run| !run.verdict.passed()), "{name}: {:?}", perturbed.rows());
    }
}

#[test]
fn an_exported_graph_equals_itself_and_a_changed_cache_is_named() {
    let Some(exported) = Exported::open("llama_gqa") else { return };
    let mut check = check(|dtype| exported.decoder(dtype), None);
    for ((name, base), (_, folded)) in exported.opens().into_iter().zip(exported.opens()) {
        assert_eq!(check.no_op(NoOpPair { name: name.into(), base, folded }), Verdict::Pass);
    }
    let mut calls = 0;
    let change = move |name: &str, array: &mut ndarray::ArrayD<f32>| {
        calls += usize::from(name == "logits");
        // Five calls without steps or before them: the sixth is a cached step.
        if name == "present.1.value" && calls == 6 {
            array[[0, 1, 12, 15]] = array[[0, 1, 12, 15]].next_down();
        }
    };
    let folded = tract(&exported.graph);
    let folded: Open<'_> = Box::new(|| Ok(Box::new(Tampered { inner: folded()?, change })));
    let pair = NoOpPair { name: "tract".into(), base: tract(&exported.graph), folded };
    assert_eq!(check.no_op(pair), Verdict::Fail);
    let report = report(check);
    let found = report.no_op.last().unwrap().first_difference.as_ref().unwrap();
    assert_eq!((found.case.as_str(), found.call), ("cached_decode", 1));
    assert_eq!((found.output.as_str(), &found.index[..]), ("present.1.value", &[0, 1, 12, 15][..]));
}

/// Says of itself that it ran elsewhere.
struct Elsewhere(CandleSession, BTreeMap<String, usize>);

impl Session for Elsewhere {
    fn inputs(&self) -> &[runtime::Port] {
        self.0.inputs()
    }

    fn outputs(&self) -> &[runtime::Port] {
        self.0.outputs()
    }

    fn info(&self) -> runtime::RuntimeInfo {
        runtime::RuntimeInfo { device: "cuda".into(), ..self.0.info() }
    }

    fn nodes(&self) -> Option<BTreeMap<String, usize>> {
        Some(self.1.clone())
    }

    fn run_tensors(
        &mut self,
        feeds: Vec<(String, runtime::Tensor)>,
    ) -> runtime::Result<Vec<(String, runtime::Tensor)>> {
        self.0.run_tensors(feeds)
    }
}

/// The logits are right, and the graph did not run where it was to.
#[test]
fn a_provider_that_took_no_node_is_told() {
    let cpu = ("CPUExecutionProvider".to_owned(), 31);
    let cuda = ("CUDAExecutionProvider".to_owned(), 2);
    for (nodes, verdict, kind) in [
        (vec![cpu.clone()], Verdict::Fail, FindingKind::CpuFallback),
        (vec![cpu, cuda], Verdict::Pass, FindingKind::Parity),
    ] {
        let report = in_tiny(None, Elsewhere(tiny_session(None, FAITHFUL), nodes.into_iter().collect()));
        assert_eq!((report.verdict, report.finding.kind), (verdict, kind), "{}", report.finding.text);
        assert!(report.runs[0].cases.iter().all(|case| case.verdict.passed()));
        if kind == FindingKind::CpuFallback {
            assert!(report.finding.text.contains("took none of the 31 nodes"), "{}", report.finding.text);
            assert_eq!(failures(&report).len(), 1);
        }
    }
}

/// The models of a case's rows, each by itself, are what a batch of all of them is.
#[test]
fn rows_of_a_batch_are_judged_by_their_own_models() {
    let [small, large] = [0.1, 0.3].map(tiny_adapter);
    let prompts = [vec![5, 6, 7], vec![8], vec![9, 10]];
    let case =
        |models: &[usize]| Case::batch("c", &prompts, crate::parity::Padding::Left, 2).unwrap().for_models(models);
    let [none, small, large] = [None, Some(&small), Some(&large)].map(|a| Candle::new(tiny_decoder(DType::F64), a));
    let models = [none.model(), small.model(), large.model()];
    let compute =
        |models: &[usize]| Reference::compute_each(&[none.model(), small.model(), large.model()], vec![case(models)]);
    let mixed = compute(&[2, 0, 1]).unwrap();
    for (row, model) in [(0, 2), (1, 0), (2, 1)] {
        let alone = Reference::compute(models[model], vec![case(&[0])]).unwrap();
        let of_row = |reference: &Reference| -> Vec<f64> {
            let case = &reference.cases[0];
            let spots = case.script.spots.iter().enumerate().filter(|(_, spot)| spot.row == row);
            spots.flat_map(|(spot, _)| case.logits.row(spot).to_vec()).collect()
        };
        let far = of_row(&mixed).iter().zip(of_row(&alone)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(far < 1e-12, "row {row}: {far}");
    }
    assert!(matches!(compute(&[3]), Err(Error::Option { option: "model", .. })));
}

/// What a graph does otherwise is read off its logits: nothing but them is known of it.
#[test]
fn the_cause_of_a_failure_is_recognised() {
    let adapter = tiny_adapter(0.3);
    let explained = |spec: &crate::base::DecoderSpec, adapter: Option<&Adapter>, session: CandleSession| {
        let weights = |dtype| move |weight: &crate::base::WeightShape| testing::tiny_weight(weight, dtype);
        let decoder = |dtype| Decoder::from_weights(spec, weights(dtype)).unwrap();
        let mut check = check(decoder, adapter);
        check.run(candidate(session));
        check
            .explain(|reference, suspect, cases| {
                let decoder = Decoder::from_weights(&suspect.spec, weights(DType::F64)).unwrap();
                let candle = Candle::new(decoder, adapter);
                reference.suspected(&[candle.model()], suspect, cases)
            })
            .unwrap();
        report(check).finding
    };
    let spec = testing::tiny_spec();
    for (distort, adapter, cause) in [
        (FAITHFUL, None, None),
        (UNMASKED, None, Some("does not hide padding")),
        (testing::BY_COLUMN, Some(&adapter), Some("counts positions by column, padding included")),
        // no known way to be wrong
        (SHIFTED, Some(&adapter), None),
    ] {
        let found = explained(&spec, adapter, tiny_session(adapter, distort));
        assert_eq!(found.cause.as_deref(), cause, "{}", found.text);
        assert!(cause.is_none_or(|cause| found.text.ends_with(cause)), "{}", found.text);
    }

    let mut whole = spec.clone();
    whole.layers.iter_mut().for_each(|layer| layer.window = Some(4));
    (whole.attention.softcap, whole.head.softcap) = (Some(0.5), Some(3.0));
    let session = |change: &dyn Fn(&mut crate::base::DecoderSpec)| {
        let mut spec = whole.clone();
        change(&mut spec);
        let decoder = Decoder::from_weights(&spec, |weight| testing::tiny_weight(weight, DType::F32)).unwrap();
        CandleSession::new(decoder, None, FAITHFUL)
    };
    let cause = |change: &dyn Fn(&mut crate::base::DecoderSpec)| explained(&whole, None, session(change)).cause;
    assert_eq!(cause(&|_| ()), None);
    let no_window = |spec: &mut crate::base::DecoderSpec| spec.layers.iter_mut().for_each(|layer| layer.window = None);
    assert_eq!(cause(&no_window).unwrap(), "leaves out the sliding window of 4 tokens");
    assert_eq!(
        cause(&|spec| (spec.attention.softcap, spec.head.softcap) = (None, None)).unwrap(),
        "leaves out the soft cap of 0.5 on the scores and the soft cap of 3 on the logits"
    );
    assert_eq!(
        cause(&|spec| spec.layers.iter_mut().for_each(|layer| layer.window = Some(5))).unwrap(),
        "has a sliding window that is one token longer than 4"
    );
    // half of the layers is none of what is known
    assert_eq!(cause(&|spec| spec.layers[0].window = None), None);
}

/// A run that is too far from the reference passes where sums in another order are as far at the same positions, and only that run.
#[test]
fn what_rounding_explains_is_judged_by_what_was_measured() {
    let faithful = {
        let mut check = check(tiny_decoder, None);
        check.run(candidate(tiny_session(None, FAITHFUL)));
        check.runs[0].cases[0].clone()
    };
    let away = faithful.figures.unwrap().max_abs;
    let worst = (0..faithful.errors.len()).find(|spot| faithful.errors[*spot] == away).unwrap();
    // within √24 of what is allowed, which other orders of 24 terms can be; no other position is as far
    let others = faithful.errors.iter().enumerate().filter(|(spot, _)| *spot != worst);
    let allowed = 0.5 * (away + others.fold(0.0, |most: f64, (_, error)| most.max(*error)));
    assert!(allowed < away && away < 4.0 * allowed, "{:?}", faithful.errors);
    // logits that are off at one position
    let off = |reference: &Reference, spot: usize, by: f64| {
        let mut logits = reference.cases[0].logits.clone();
        logits.row_mut(spot).mapv_inplace(|logit| logit + by);
        logits
    };
    let judged = |off_in: SumOrder, in_order: &dyn Fn(&Reference) -> Array2<f64>| {
        let mut check = check(tiny_decoder, None);
        check.cases[0].allowance.allowed = allowed;
        check.run(candidate(tiny_session(None, FAITHFUL)));
        check.run(candidate(tiny_session(None, SHIFTED)));
        assert_eq!((check.runs[0].verdict, check.failed.len(), check.failed_run), (Verdict::Fail, 1, 0));
        let mut asked = Vec::new();
        check
            .reconsider(|reference, order, cases| {
                assert_eq!(cases, [0]);
                asked.push(order);
                Ok(vec![if order == off_in { in_order(reference) } else { reference.cases[0].logits.clone() }])
            })
            .unwrap();
        (check, asked)
    };
    let factor = Budget::FACTOR;
    let (explained, asked) = judged(SumOrder::Backward, &|reference| off(reference, worst, 1.01 * away / factor));
    let case = &explained.runs[0].cases[0];
    assert_eq!((case.verdict, &case.failure, explained.runs[0].verdict), (Verdict::Pass, &None, Verdict::Pass));
    assert!(case.in_order.is_some_and(|part| part <= 1.0 && case.used() == Some(part)) && case.allowed < away);
    assert!(explained.failed.is_empty() && asked.starts_with(&[SumOrder::Forward, SumOrder::Backward]), "{asked:?}");
    // the same distance too small, and at another position
    let other = (worst + 1) % faithful.errors.len();
    for (spot, by) in [(worst, 0.99 * allowed / factor), (other, away)] {
        let (unexplained, asked) = judged(SumOrder::Forward, &|reference| off(reference, spot, by));
        assert_eq!((unexplained.runs[0].verdict, unexplained.failed.len(), asked.len()), (Verdict::Fail, 1, 4));
        let case = &unexplained.runs[0].cases[0];
        assert!(case.failure.is_some() && case.in_order.is_some_and(|part| part > 1.0), "{case:?}");
        assert!(case.used().is_some_and(|part| (part - away / allowed).abs() < 1e-12));
    }
}

/// What is as far away as no order of sums can be is a fault, and nothing is computed for it.
#[test]
fn a_fault_is_not_reconsidered() {
    let mut check = check(tiny_decoder, Some(&tiny_adapter(0.3)));
    check.run(candidate(tiny_session(None, FAITHFUL)));
    check.reconsider(|_, _, _| panic!("nothing is to be computed")).unwrap();
    assert_eq!(check.runs[0].verdict, Verdict::Fail);
}

/// The cause is looked for in the run that fails whatever the order of sums.
#[test]
fn the_cause_is_that_of_the_run_that_fails_for_sure() {
    let mut check = check(tiny_decoder, None);
    let allowed = check.cases[0].allowance.allowed;
    check.run(candidate(tiny_session(None, FAITHFUL)));
    let away = check.runs[0].cases[0].figures.unwrap().max_abs;
    check.cases[0].allowance.allowed = 0.5 * away;
    check.run(candidate(tiny_session(None, FAITHFUL)));
    assert_eq!((check.failed.len(), check.failed_run), (1, 1));
    check.cases[0].allowance.allowed = allowed;
    check.run(candidate(tiny_session(None, UNMASKED)));
    assert_eq!((check.failed.len(), check.failed_run), (2, 2));
    let model = Candle::new(tiny_decoder(DType::F32), None);
    check.reconsider(|reference, _, _| Ok(vec![reference.replay(model.model()).unwrap().remove(0)])).unwrap();
    let verdicts: Vec<_> = check.runs.iter().map(|run| run.verdict).collect();
    assert_eq!((verdicts, check.failed.len()), (vec![Verdict::Pass, Verdict::Pass, Verdict::Fail], 2));
}

/// candle with its sums in order is candle, but for rounding, which differs from order to order.
#[test]
fn sums_in_order_are_the_same_function() {
    let adapter = tiny_adapter(0.3);
    let check = check(tiny_decoder, Some(&adapter));
    let model = Candle::new(tiny_decoder(DType::F32), Some(&adapter));
    let all: Vec<usize> = (0..check.cases.len()).collect();
    let mut seen: Vec<f64> = Vec::new();
    for order in SumOrder::ALL {
        let logits = check.reference.in_order(&[model.model()], order, &all).unwrap();
        for (case, logits) in check.reference.cases.iter().zip(&logits) {
            let figures = case.figures(logits).unwrap();
            assert!(figures.max_abs > 0.0 && figures.max_abs < 1e-4, "{}: {:.2e}", case.case.name(), figures.max_abs);
        }
        seen.push(check.reference.cases[0].figures(&logits[0]).unwrap().max_abs);
    }
    seen.sort_by(f64::total_cmp);
    seen.dedup();
    assert!(seen.len() > 1, "{seen:?}");
}
