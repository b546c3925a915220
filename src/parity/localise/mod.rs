//! Where a graph first departs from the reference.
//!
//! A failing case is run once more, in the same runtime, by a copy of the graph that gives its inner tensors out. They are compared
//! with what candle computes at the same places, in the order of the data ([`Place`]), each by the error budget of its own: candle's
//! distance there in the graph's precision, and the floor. Between the last place that agrees and the first that departs lie
//! the nodes at fault. Another runtime computes each of them from the same inputs: where one differs, a runtime is wrong; where none
//! does, the graph is. What was cut out is written as a test of `onnx`'s own kind (`reproducer`).

mod compare;
mod departure;
mod layout;
mod place;
mod reference;
mod segment;
mod tapped;
mod taps;
#[cfg(test)]
mod tests;
mod types;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

pub use departure::{Departure, Fault, LayerErrors};
pub use place::Place;

use self::compare::{Calls, Gap, departure, is_stream};
use self::reference::{Trace, trace};
use self::segment::{Cut, Disagreement, Segment, second_way};
use self::tapped::{Seen, Tapped};
use self::taps::Taps;
use super::check::ToLocalise;
use super::run::Script;
use super::{Budget, Model, Result, RunCase, Verdict, reproducer};
use crate::base::DecoderSpec;
use crate::onnx;
use crate::runtime::{self, NamedGiven, NamedValues, RuntimeInfo, Session};

/// Opens a file in a runtime, of whose optional inputs these will be fed.
pub type OpenAt<'a> = Box<dyn Fn(&Path, &[String]) -> runtime::Result<Box<dyn Session>> + 'a>;

/// A runtime.
pub struct Way<'a> {
    /// Its name in the report.
    pub name: String,
    /// Opens a file.
    pub open: OpenAt<'a>,
}

/// What is needed to find where runs depart.
pub struct Localise<'a> {
    /// The graph's file.
    pub file: &'a Path,
    /// The graph.
    pub graph: &'a onnx::Model,
    /// What it is given with every run, beside what a decoder is fed, by model.
    pub given: &'a [NamedGiven],
    /// The checkpoint's decoder.
    pub spec: &'a DecoderSpec,
    /// The reference: the models that the rows of a case name.
    pub reference: &'a [Model<'a>],
    /// The same in the graph's precision.
    pub own: &'a [Model<'a>],
    /// The runtimes: those of the check's runs, by their names, and others to ask for a second opinion.
    pub ways: &'a [Way<'a>],
    /// Where reproducers are written, a folder for each run.
    pub reproducers: Option<&'a Path>,
}

/// A case shows a fault well whose distance, in units of what is allowed, is this part of the largest.
const CLEAR: f64 = 0.1;

/// candle's tensors of a case.
struct Traces {
    reference: Vec<Trace>,
    own: Vec<Trace>,
}

/// A case and what it is compared by.
struct Subject<'a> {
    what: &'a Localise<'a>,
    taps: &'a Taps,
    traces: &'a Traces,
    case: &'a str,
    script: &'a Script,
    budget: Budget,
}

/// A graph's run with tensors given out.
struct Capture {
    graph: onnx::Model,
    info: RuntimeInfo,
    seen: Vec<Seen>,
    left_out: Vec<String>,
}

impl Localise<'_> {
    /// Finds where each failing run departs, in the failing case of the fewest positions that shows it well. What cannot be found leaves the run as
    /// it is, with a warning.
    ///
    /// # Errors
    /// When candle fails.
    pub(super) fn runs(&self, judged: ToLocalise<'_>) -> Result<()> {
        let ToLocalise { cases, runs, budget } = judged;
        let mut taps = None;
        let mut traces: BTreeMap<usize, Traces> = BTreeMap::new();
        for run in runs.iter_mut().filter(|run| run.verdict == Verdict::Fail) {
            let failing = run.cases.iter().enumerate().filter(|(_, case)| case.verdict == Verdict::Fail);
            let size = |case: usize| cases.get(case).map_or(usize::MAX, |case| case.1.spots.len());
            // a small case that shows the fault well; one without figures may be one that the runtime does not run at all
            let ratio = |case: &RunCase| case.figures.map_or(0.0, |figures| figures.max_abs / case.allowed);
            let most = run.cases.iter().map(ratio).fold(0.0, f64::max);
            let shows = |case: &RunCase| case.figures.is_some() && ratio(case) >= CLEAR * most;
            let found = failing.min_by_key(|(number, case)| (!shows(case), case.figures.is_none(), size(*number)));
            let Some((case, ran)) = found.map(|(number, case)| (number, case.figures.is_some())) else { continue };
            let (Some((name, script)), Some(way)) =
                (cases.get(case), self.ways.iter().position(|way| way.name == run.name))
            else {
                continue;
            };
            let taps = taps.get_or_insert_with(|| Taps::find(self.graph, self.spec));
            let traces = match traces.entry(case) {
                std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
                std::collections::btree_map::Entry::Vacant(entry) => {
                    entry.insert(Traces { reference: trace(self.reference, script)?, own: trace(self.own, script)? })
                }
            };
            let subject = Subject { what: self, taps, traces, case: name, script, budget };
            match subject.departure(way) {
                Ok((departure, layers)) => (run.departure, run.layers) = (departure, layers),
                Err(error) if ran => tracing::warn!("where {} departs was not found: {error}", run.name),
                Err(error) => tracing::debug!("{} gives no tensors: {error}", run.name),
            }
        }
        Ok(())
    }
}

impl Subject<'_> {
    /// The first departure of a run, and the stream's errors by layer.
    fn departure(&self, way: usize) -> Result<(Option<Departure>, Vec<LayerErrors>)> {
        let graph = match &self.taps.patch {
            Some(patch) => patch.clone().apply(self.what.graph)?,
            None => self.what.graph.clone(),
        };
        let tensors = self.taps.taps.iter().map(|tap| tap.tensor.clone()).collect();
        let capture = self.capture(way, &graph, &tensors)?;
        let calls = self.calls(&capture.seen);
        let gaps = calls.gaps(&self.taps.taps, &self.budget);
        let layers = self.layers(&gaps);
        let mut notes = self.taps.notes.clone();
        notes.push(format!("captured in {}", level(&capture.info)));
        if !capture.left_out.is_empty() {
            notes.push(format!("of no known type, and so not captured: {}", capture.left_out.join(", ")));
        }
        let Some((first, before)) = departure(&gaps) else {
            notes.push(
                "with its inner tensors given out the graph does not depart: what the runtime fuses is at fault".into(),
            );
            let departure = gaps.iter().rev().find(|gap| gap.tap.at.place == Place::Logits).map(|gap| Departure {
                fault: Fault::Runtime,
                notes,
                ..self.named(&graph, gap)
            });
            return Ok((departure, layers));
        };
        let usual = before.max(1.0);
        if before > 1.0 {
            notes.push(format!("rounding before it is up to {before:.1} times what is allowed"));
        }
        let mut departure = Departure { notes, ..self.named(&graph, first) };
        let agreeing = gaps.iter().filter(|gap| gap.call == first.call && gap.ratio() <= usual);
        let agreeing: Vec<&str> = agreeing.map(|gap| gap.tap.tensor.as_str()).collect();
        self.bisect(way, &graph, (first, usual), &agreeing, &mut departure)?;
        Ok((Some(departure), layers))
    }

    fn capture(&self, way: usize, graph: &onnx::Model, tensors: &BTreeSet<String>) -> Result<Capture> {
        let tapped = Tapped::new(self.what.file, graph, tensors)?;
        let fed: BTreeSet<String> = self.what.given.iter().flatten().map(|(name, _)| name.clone()).collect();
        let session = self.open(way, &tapped.path(), &fed.into_iter().collect::<Vec<_>>())?;
        let (info, seen) = tapped.run(session, self.what.given, self.script, self.what.spec)?;
        Ok(Capture { graph: tapped.model, info, seen, left_out: tapped.left_out })
    }

    fn open(&self, way: usize, path: &Path, fed: &[String]) -> runtime::Result<Box<dyn Session>> {
        match self.what.ways.get(way) {
            Some(way) => (way.open)(path, fed),
            None => Err(runtime::Error::NoLibrary { tried: Vec::new() }),
        }
    }

    fn calls<'s>(&'s self, seen: &'s [Seen]) -> Calls<'s> {
        let masks = self.script.calls().0.map(|(_, mask)| mask).collect();
        Calls { masks, reference: &self.traces.reference, own: &self.traces.own, seen }
    }

    fn layers(&self, gaps: &[Gap]) -> Vec<LayerErrors> {
        let mut layers: BTreeMap<usize, LayerErrors> = BTreeMap::new();
        for gap in gaps.iter().filter(|gap| is_stream(gap.tap.at)) {
            let entry = layers.entry(gap.tap.at.layer).or_insert_with(|| LayerErrors {
                case: self.case.to_owned(),
                layer: gap.tap.at.layer,
                tensor: gap.tap.tensor.clone(),
                errors: Vec::new(),
            });
            entry.errors.extend(&gap.errors);
        }
        layers.into_values().collect()
    }

    /// A departure at a place, of which nothing more is known.
    fn named(&self, graph: &onnx::Model, gap: &Gap) -> Departure {
        let tensor = gap.tap.tensor.clone();
        let node = graph.graph().nodes().iter().find(|node| node.outputs().contains(&tensor));
        Departure {
            case: self.case.to_owned(),
            call: gap.call,
            layer: gap.tap.at.decoder_layer(),
            place: gap.tap.at.place,
            node: node.map(label),
            tensor,
            distance: gap.distance,
            allowed: gap.allowed,
            row: gap.row,
            column: gap.column,
            fault: Fault::Unknown,
            nodes: Vec::new(),
            notes: Vec::new(),
            reproducer: None,
        }
    }

    /// Looks at the nodes between what agrees and what departs.
    fn bisect(
        &self,
        way: usize,
        graph: &onnx::Model,
        (gap, usual): (&Gap, f64),
        agreeing: &[&str],
        departure: &mut Departure,
    ) -> Result<()> {
        let mut segment = Segment::between(graph, &gap.tap.tensor, agreeing);
        if segment.nodes.is_empty()
            && let Some(node) = graph.graph().nodes().iter().find(|node| node.outputs().contains(&gap.tap.tensor))
        {
            segment = Segment::only(graph, node.id());
        }
        departure.nodes = names(graph, &segment);
        let capture = self.capture(way, graph, &segment.tensors())?;
        let again = self.calls(&capture.seen).gaps(std::slice::from_ref(&gap.tap), &self.budget);
        let Some(seen) = capture.seen.get(gap.call) else { return Ok(()) };
        if !again.iter().any(|again| again.call == gap.call && again.ratio() > usual) {
            departure.fault = Fault::Runtime;
            departure.notes.push(
                "with every tensor of these nodes given out it does not depart: what the runtime fuses is at fault"
                    .into(),
            );
        }
        let folder = self.what.file.parent().unwrap_or(Path::new("."));
        let Some(cut) = segment.model(&capture.graph, folder, seen, &segment.makes) else { return Ok(()) };
        let found = self.second(way, &cut, &capture.graph, &segment, seen);
        if let Some((other, found)) = &found {
            match found {
                Some(found) => {
                    departure.fault = Fault::Runtime;
                    departure.nodes = names(graph, &Segment::only(graph, found.node));
                    departure.tensor.clone_from(&found.tensor);
                    departure.node = departure.nodes.first().cloned();
                    let distance = found.distance;
                    departure.notes.push(format!(
                        "{other} computes this node otherwise from the same inputs, {distance:.2e} away"
                    ));
                }
                None if departure.fault == Fault::Unknown => {
                    departure.fault = Fault::Graph;
                    departure.notes.push(format!("{other} computes each of these nodes alike: the graph is at fault"));
                }
                None => {}
            }
        }
        let Some(reproducers) = self.what.reproducers else { return Ok(()) };
        let run = self.what.ways.get(way).map_or("run", |way| way.name.as_str());
        let name: String = run.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect();
        // onnx's loader knows a test by the beginning of its name
        let target = reproducers.join(format!("test_{name}"));
        let mut outputs = NamedValues::new();
        let written = match found.and_then(|(_, found)| found) {
            Some(found) => {
                let one = Segment::only(&capture.graph, found.node);
                outputs.insert(found.tensor.as_str(), found.other);
                one.model(&capture.graph, folder, seen, &[found.tensor])
            }
            None => {
                let Some(expected) = self.calls(&capture.seen).expected(gap) else { return Ok(()) };
                outputs.insert(gap.tap.tensor.as_str(), expected);
                segment.model(&capture.graph, folder, seen, std::slice::from_ref(&gap.tap.tensor))
            }
        };
        if let Some(Cut { model, feeds }) = written {
            reproducer::write(&target, &model, &feeds, &outputs)?;
            departure.reproducer = Some(target.to_string_lossy().into_owned());
        }
        Ok(())
    }

    /// What the first other runtime that can run a segment makes of it, and its name.
    fn second(
        &self,
        way: usize,
        cut: &Cut,
        graph: &onnx::Model,
        segment: &Segment,
        seen: &Seen,
    ) -> Option<(String, Option<Disagreement>)> {
        let others = self.what.ways.iter().enumerate().filter(|(index, _)| *index != way);
        { others }.find_map(|(_, other)| {
            let open = |path: &Path| (other.open)(path, &[]);
            let relative = self.budget.factor * self.budget.relative_floor;
            let found = second_way(cut, graph, segment, seen, relative, &open);
            let found = found.inspect_err(|error| tracing::debug!("{} cannot run the segment: {error}", other.name));
            Some((other.name.clone(), found.ok()?))
        })
    }
}

fn names(graph: &onnx::Model, segment: &Segment) -> Vec<String> {
    let nodes = segment.nodes.iter().filter_map(|id| graph.graph().node(*id));
    nodes.filter(|node| !node.is("", "Constant")).map(label).collect()
}

/// How a node is named to people.
fn label(node: &onnx::Node) -> String {
    let name = if node.name().is_empty() { node.output(0).unwrap_or_default() } else { node.name() };
    format!("{} `{name}`", node.op_type())
}

fn level(info: &RuntimeInfo) -> String {
    format!("{} {}, optimisation: {}", info.runtime, info.version, info.optimization)
}
