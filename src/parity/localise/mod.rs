//! Where a graph first departs from the reference.
//!
//! A failing case is run once more, in the same runtime, by a copy of the graph that gives its inner tensors out. They are compared
//! with what candle computes at the same places, in the order of the data ([`Place`]), each by the error budget of its own: candle's
//! distance there in the graph's precision, and the floor. Between the last place that agrees and the first that departs lie
//! the nodes at fault. Another runtime computes each of them from the same inputs: where one differs, a runtime is wrong; where none
//! does, the graph is. What was cut out is written as a test of `onnx`'s own kind (`reproducer`). Layers in the branches of an `If` are
//! compared in the branch that a call takes ([`branches`]).

mod angles;
mod branches;
mod by_value;
mod compare;
mod counterpart;
mod departure;
mod layout;
mod place;
mod reference;
mod scores;
mod segment;
mod tapped;
mod taps;
#[cfg(test)]
mod tests;
mod types;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::rc::Rc;

pub use departure::{Departure, Fault, LayerErrors};
pub use place::Place;

use self::branches::{Branch, Branches};
use self::by_value::by_value;
use self::compare::{Calls, Gap, departure, is_stream};
use self::counterpart::counterparts;
use self::reference::{Trace, trace};
use self::segment::{Cut, Disagreement, Second, Segment, second_way};
use self::tapped::{Seen, Tapped};
use self::taps::Taps;
use self::types::floats;
use super::check::ToLocalise;
use super::run::Script;
use super::{AgainstCase, AgainstReport, Budget, Model, Ports, Result, RunCase, RunReport, Verdict, reproducer};
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
    /// What it should compute.
    pub truth: Truth<'a>,
    /// The runtimes: those of the check's runs, by their names, and others to ask for a second opinion.
    pub ways: &'a [Way<'a>],
    /// Where reproducers are written, a folder for each run.
    pub reproducers: Option<&'a Path>,
}

/// What a graph should compute.
pub enum Truth<'a> {
    /// What candle computes.
    Model {
        /// The checkpoint's decoder.
        spec: &'a DecoderSpec,
        /// The reference: the models that the rows of a case name.
        reference: &'a [Model<'a>],
        /// The same in the graph's precision.
        own: &'a [Model<'a>],
    },
    /// What another graph computes.
    Graph {
        /// The graph's file.
        file: &'a Path,
        /// The graph.
        graph: &'a onnx::Model,
        /// What it is given, as [`Localise::given`].
        given: &'a [NamedGiven],
        /// The runtime that runs it; the one that is looked at where there is none.
        way: Option<&'a Way<'a>>,
    },
}

/// A case shows a fault well whose distance, in units of what is allowed, is this part of the largest.
const CLEAR: f64 = 0.1;

/// What the places of a case should hold.
#[derive(Clone)]
struct Traces {
    reference: Rc<Vec<Trace>>,
    /// The same in the graph's precision.
    own: Rc<Vec<Trace>>,
}

/// What was computed for one run and serves others.
#[derive(Default)]
struct Known {
    /// The graph as its runs take it, and where its places are.
    taps: Option<(Rc<Branches>, Taps)>,
    /// By case.
    traces: BTreeMap<usize, Traces>,
    /// What the other graph computes, by case and the run's runtime.
    other: BTreeMap<(usize, Option<usize>), Rc<Vec<Seen>>>,
}

/// A case of a run: whether it failed, how far it is from the reference, and how far it may be.
pub(super) struct Outcome {
    failed: bool,
    distance: Option<f64>,
    allowed: f64,
}

impl From<&RunCase> for Outcome {
    fn from(case: &RunCase) -> Self {
        let distance = case.figures.map(|figures| figures.max_abs);
        Self { failed: case.verdict == Verdict::Fail, distance, allowed: case.allowed }
    }
}

impl From<&AgainstCase> for Outcome {
    fn from(case: &AgainstCase) -> Self {
        let distance = case.figures.map(|figures| figures.max_abs);
        Self { failed: case.verdict == Verdict::Fail, distance, allowed: case.allowed }
    }
}

/// A case and what it is compared by.
struct Subject<'a> {
    what: &'a Localise<'a>,
    branches: &'a Branches,
    taps: &'a Taps,
    traces: &'a Traces,
    case: &'a str,
    script: &'a Script,
    ports: Ports,
    budget: Budget,
}

/// Where a run departs, and the stream's errors by layer.
type Found = (Option<Departure>, Vec<LayerErrors>);

/// A graph's run with tensors given out.
struct Capture {
    info: RuntimeInfo,
    seen: Vec<Seen>,
    left_out: Vec<String>,
}

impl Localise<'_> {
    /// Finds where each failing run departs. What cannot be found leaves the run as it is, with a warning.
    ///
    /// # Errors
    /// When candle fails.
    pub(super) fn runs(&self, judged: &ToLocalise<'_>, runs: &mut [RunReport]) -> Result<()> {
        let mut known = Known::default();
        for run in runs.iter_mut().filter(|run| run.verdict == Verdict::Fail) {
            let outcomes: Vec<Outcome> = run.cases.iter().map(Outcome::from).collect();
            if let Some((departure, layers)) = self.run(&run.name, &outcomes, judged, &mut known)? {
                (run.departure, run.layers) = (departure, layers);
            }
        }
        Ok(())
    }

    /// The same for runs that are compared with another graph's.
    ///
    /// # Errors
    /// As [`runs`](Self::runs).
    pub(super) fn pairs(&self, judged: &ToLocalise<'_>, pairs: &mut [AgainstReport]) -> Result<()> {
        let mut known = Known::default();
        for pair in pairs.iter_mut().filter(|pair| pair.verdict == Verdict::Fail) {
            let outcomes: Vec<Outcome> = pair.cases.iter().map(Outcome::from).collect();
            if let Some((departure, _)) = self.run(&pair.name, &outcomes, judged, &mut known)? {
                pair.departure = departure;
            }
        }
        Ok(())
    }

    /// Where a run departs, in the failing case of the fewest positions that shows it well.
    fn run(
        &self,
        name: &str,
        outcomes: &[Outcome],
        judged: &ToLocalise<'_>,
        known: &mut Known,
    ) -> Result<Option<Found>> {
        let size = |case: usize| judged.cases.get(case).map_or(usize::MAX, |case| case.1.spots.len());
        // a small case that shows the fault well; one without figures may be one that the runtime does not run at all
        let ratio = |case: &Outcome| case.distance.map_or(0.0, |distance| distance / case.allowed);
        let most = outcomes.iter().map(ratio).fold(0.0, f64::max);
        let shows = |case: &Outcome| case.distance.is_some() && ratio(case) >= CLEAR * most;
        let failing = outcomes.iter().enumerate().filter(|(_, case)| case.failed);
        let found = failing.min_by_key(|(number, case)| (!shows(case), case.distance.is_none(), size(*number)));
        let Some((case, ran)) = found.map(|(number, case)| (number, case.distance.is_some())) else { return Ok(None) };
        let (Some((case_name, script)), Some(way)) =
            (judged.cases.get(case), self.ways.iter().position(|way| way.name == name))
        else {
            return Ok(None);
        };
        let places = match &self.truth {
            Truth::Model { spec, reference, own } => {
                let traces = match known.traces.entry(case) {
                    Entry::Occupied(entry) => entry.get().clone(),
                    Entry::Vacant(entry) => {
                        let [reference, own] = [trace(reference, script)?, trace(own, script)?].map(Rc::new);
                        entry.insert(Traces { reference, own }).clone()
                    }
                };
                let found = match known.taps.take() {
                    Some(found) => Ok(found),
                    None => Branches::of(self.graph).map(|branches| {
                        let taps = Taps::find(&branches, spec);
                        (Rc::new(branches), taps)
                    }),
                };
                found.and_then(|(branches, taps)| {
                    known.taps = Some((Rc::clone(&branches), taps.clone()));
                    let taps = self.completed(taps, &branches, &traces, way, script, judged)?;
                    Ok((branches, taps, traces))
                })
            }
            Truth::Graph { .. } => self.counterparts(case, way, script, judged, known),
        };
        let found = places.and_then(|(branches, taps, traces)| {
            let subject = Subject {
                what: self,
                branches: &branches,
                taps: &taps,
                traces: &traces,
                case: case_name,
                script,
                ports: judged.ports,
                budget: judged.budget,
            };
            subject.departure(way)
        });
        match found {
            Ok(found) => return Ok(Some(found)),
            Err(error) if ran => tracing::warn!("where {name} departs was not found: {error}"),
            Err(error) => tracing::debug!("{name} gives no tensors: {error}"),
        }
        Ok(None)
    }

    /// Looks by value for the places that were not found by data flow, where attention was not recognised.
    fn completed(
        &self,
        mut taps: Taps,
        branches: &Branches,
        traces: &Traces,
        way: usize,
        script: &Script,
        judged: &ToLocalise<'_>,
    ) -> Result<Taps> {
        if taps.attention.len() == branches.taken.len() {
            return Ok(taps);
        }
        let way = self.way(way)?;
        let seen = seen_all(way, (self.file, branches, self.given), script, judged.ports)?;
        let masks = script.calls().0.map(|(_, mask)| mask).collect();
        let calls = Calls { masks, reference: &traces.reference, own: &traces.own, seen: &seen };
        for (number, branch) in branches.taken.iter().enumerate() {
            if !taps.attention.contains(&number) {
                taps = by_value(taps, (&branch.graph, number), &calls, &judged.budget);
            }
        }
        Ok(taps)
    }

    /// The tensors that this graph and the other one have in common, and what the other one computes there.
    fn counterparts(
        &self,
        case: usize,
        way: usize,
        script: &Script,
        judged: &ToLocalise<'_>,
        known: &mut Known,
    ) -> Result<(Rc<Branches>, Taps, Traces)> {
        let branches = Branches::of(self.graph)?;
        let Truth::Graph { file, graph, given, way: of_other } = &self.truth else {
            let traces = Traces { reference: Rc::default(), own: Rc::default() };
            return Ok((Rc::new(branches), Taps::default(), traces));
        };
        let other_branches = Branches::of(graph)?;
        let own_way = self.way(way)?;
        let key = (case, of_other.is_none().then_some(way));
        let other = match known.other.entry(key) {
            Entry::Occupied(entry) => Rc::clone(entry.get()),
            Entry::Vacant(entry) => {
                let seen = seen_all(of_other.unwrap_or(own_way), (file, &other_branches, given), script, judged.ports)?;
                Rc::clone(entry.insert(Rc::new(seen)))
            }
        };
        let seen = seen_all(own_way, (self.file, &branches, self.given), script, judged.ports)?;
        let masks: Vec<_> = script.calls().0.map(|(_, mask)| mask).collect();
        let (taps, reference) = counterparts((&branches, &seen), (&other_branches, &other), &masks, &judged.budget);
        let reference = Rc::new(reference);
        Ok((Rc::new(branches), taps, Traces { own: Rc::clone(&reference), reference }))
    }

    fn way(&self, way: usize) -> runtime::Result<&Way<'_>> {
        self.ways.get(way).ok_or(runtime::Error::NoLibrary { tried: Vec::new() })
    }
}

/// Runs a graph with every tensor of floating-point numbers given out.
fn seen_all(
    way: &Way<'_>,
    (file, branches, given): (&Path, &Branches, &[NamedGiven]),
    script: &Script,
    ports: Ports,
) -> Result<Vec<Seen>> {
    let all: Vec<BTreeSet<String>> = branches.taken.iter().map(|branch| floats(branch.graph.graph())).collect();
    let tapped = Tapped::new(file, branches, &all)?;
    let session = (way.open)(&tapped.path(), &names_of(given))?;
    Ok(tapped.run(session, given, script, ports)?.1)
}

/// The tensors that agree in a call. Some columns of one say nothing of the others: all of them must.
fn agreeing<'g>(gaps: &'g [Gap], (call, usual): (usize, f64), seen: Option<&Seen>) -> Vec<&'g str> {
    let mut whole = Vec::new();
    let mut parts: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    for gap in gaps.iter().filter(|gap| gap.call == call && gap.ratio() <= usual) {
        match &gap.tap.columns {
            None => whole.push(gap.tap.tensor.as_str()),
            Some(columns) => parts.entry(gap.tap.tensor.as_str()).or_default().extend(columns),
        }
    }
    let width = |tensor: &str| seen.and_then(|seen| seen.get(tensor)?.shape().last().copied());
    whole.extend(
        parts.into_iter().filter(|(tensor, columns)| width(tensor) == Some(columns.len())).map(|(name, _)| name),
    );
    whole
}

/// The inputs that are given.
fn names_of(given: &[NamedGiven]) -> Vec<String> {
    let fed: BTreeSet<String> = given.iter().flatten().map(|(name, _)| name.clone()).collect();
    fed.into_iter().collect()
}

impl Subject<'_> {
    /// The first departure of a run, and the stream's errors by layer.
    fn departure(&self, way: usize) -> Result<(Option<Departure>, Vec<LayerErrors>)> {
        let patched = match &self.taps.patch {
            Some(patch) => Some(Branches::of(&patch.clone().apply(self.what.graph)?)?),
            None => None,
        };
        let branches = patched.as_ref().unwrap_or(self.branches);
        let mut tensors = vec![BTreeSet::new(); branches.taken.len()];
        for tap in &self.taps.taps {
            if let Some(tensors) = tensors.get_mut(tap.branch) {
                tensors.insert(tap.tensor.clone());
            }
        }
        let capture = self.capture(way, branches, &tensors)?;
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
            let departure = gaps.iter().rev().find(|gap| gap.tap.named().1 == Place::Logits).map(|gap| Departure {
                fault: Fault::Runtime,
                notes,
                ..self.named(branches, gap)
            });
            return Ok((departure, layers));
        };
        let usual = before.max(1.0);
        if before > 1.0 {
            notes.push(format!("rounding before it is up to {before:.1} times what is allowed"));
        }
        let mut departure = Departure { notes, ..self.named(branches, first) };
        let before = |gap: &&Gap| gap.call == first.call && gap.tap.at < first.tap.at && gap.ratio() <= usual;
        // the term is made beside the attention and says nothing of it
        let last = gaps.iter().filter(before).map(|gap| gap.tap.at).filter(|at| at.place != Place::Term).max();
        let open = self.taps.open.iter().filter(|(branch, _)| *branch == first.tap.branch).map(|(_, at)| at);
        let open = open.filter(|at| last.is_none_or(|last| **at > last) && **at < first.tap.at);
        if let Some(open) = open.min() {
            (departure.layer, departure.place) = (open.decoder_layer(), open.place);
            departure
                .notes
                .push("no tensor of the graph holds this place: the one that is named comes after it".into());
        }
        let agreeing = agreeing(&gaps, (first.call, usual), capture.seen.get(first.call));
        self.bisect(way, branches, (first, usual), &agreeing, &mut departure)?;
        Ok((Some(departure), layers))
    }

    fn capture(&self, way: usize, branches: &Branches, tensors: &[BTreeSet<String>]) -> Result<Capture> {
        let tapped = Tapped::new(self.what.file, branches, tensors)?;
        let session = (self.what.way(way)?.open)(&tapped.path(), &names_of(self.what.given))?;
        let (info, seen) = tapped.run(session, self.what.given, self.script, self.ports)?;
        Ok(Capture { info, seen, left_out: tapped.given.left_out })
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
    fn named(&self, branches: &Branches, gap: &Gap) -> Departure {
        let tensor = gap.tap.tensor.clone();
        let (layer, place) = gap.tap.named();
        let branch = branches.taken.get(gap.tap.branch);
        let mut nodes = branch.into_iter().flat_map(|branch| branch.graph.graph().nodes());
        let node = nodes.find(|node| node.outputs().contains(&tensor));
        Departure {
            case: self.case.to_owned(),
            call: gap.call,
            layer,
            place,
            branch: branch.map(|branch| branch.scope.clone()).filter(|scope| !scope.is_empty()),
            node: node.map(label),
            tensor,
            distance: gap.distance,
            allowed: gap.allowed,
            row: gap.row,
            column: gap.column,
            fault: Fault::Unknown,
            nodes: Vec::new(),
            cause: None,
            notes: Vec::new(),
            reproducer: None,
        }
    }

    /// Looks at the nodes between what agrees and what departs.
    fn bisect(
        &self,
        way: usize,
        branches: &Branches,
        (gap, usual): (&Gap, f64),
        agreeing: &[&str],
        departure: &mut Departure,
    ) -> Result<()> {
        let Some(Branch { graph, .. }) = branches.taken.get(gap.tap.branch) else { return Ok(()) };
        let mut segment = Segment::between(graph, &gap.tap.tensor, agreeing);
        if segment.nodes.is_empty()
            && let Some(node) = graph.graph().nodes().iter().find(|node| node.outputs().contains(&gap.tap.tensor))
        {
            segment = Segment::only(graph, node.id());
        }
        departure.nodes = names(graph, &segment);
        departure.cause = angles::of_half(graph, &gap.tap.tensor, departure.place);
        let mut tensors = vec![BTreeSet::new(); branches.taken.len()];
        if let Some(tensors) = tensors.get_mut(gap.tap.branch) {
            *tensors = segment.tensors();
        }
        let capture = self.capture(way, branches, &tensors)?;
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
        let Some(cut) = segment.model(graph, folder, seen, &segment.makes) else { return Ok(()) };
        let second = self.second(way, &cut, graph, &segment, seen);
        let blamed = second.and_then(|(other, second)| self.blame(&other, second, (graph, gap, usual), departure));
        let Some(reproducers) = self.what.reproducers else { return Ok(()) };
        let run = self.what.ways.get(way).map_or("run", |way| way.name.as_str());
        let name: String = run.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '_' }).collect();
        // onnx's loader knows a test by the beginning of its name
        let target = reproducers.join(format!("test_{name}"));
        let mut outputs = NamedValues::new();
        let written = match blamed {
            Some(found) => {
                let one = Segment::only(graph, found.node);
                outputs.insert(found.tensor.as_str(), found.other);
                one.model(graph, folder, seen, &[found.tensor])
            }
            None => {
                let Some(expected) = self.calls(&capture.seen).expected(gap) else { return Ok(()) };
                outputs.insert(gap.tap.tensor.as_str(), expected);
                segment.model(graph, folder, seen, std::slice::from_ref(&gap.tap.tensor))
            }
        };
        if let Some(Cut { model, feeds }) = written {
            reproducer::write(&target, &model, &feeds, &outputs)?;
            departure.reproducer = Some(target.to_string_lossy().into_owned());
        }
        Ok(())
    }

    /// Says whether graph or runtime is at fault by what another runtime makes of the same inputs; the node that the runtime computes
    /// wrongly, where it is that. Runtimes may differ in a little that explains nothing: where the other one departs too, the graph is
    /// at fault.
    fn blame(
        &self,
        other: &str,
        second: Second,
        (graph, gap, usual): (&onnx::Model, &Gap, f64),
        departure: &mut Departure,
    ) -> Option<Disagreement> {
        let Second { made, first } = second;
        let there = made.get(&gap.tap.tensor);
        let there = there.and_then(|value| self.calls(&[]).gap_of(gap.call, &gap.tap, value, &self.budget));
        let Some(found) = first else {
            if departure.fault == Fault::Unknown {
                departure.fault = Fault::Graph;
                departure.notes.push(format!("{other} computes each of these nodes alike: the graph is at fault"));
            }
            return None;
        };
        if let Some(there) = there.filter(|there| there.ratio() > usual) {
            departure.fault = Fault::Graph;
            let distance = there.distance;
            departure.notes.push(format!(
                "{other} departs there too from the same inputs, by {distance:.2e}: the graph is at fault"
            ));
            return None;
        }
        departure.fault = Fault::Runtime;
        departure.nodes = names(graph, &Segment::only(graph, found.node));
        departure.tensor.clone_from(&found.tensor);
        departure.node = departure.nodes.first().cloned();
        let distance = found.distance;
        departure.notes.push(format!("{other} computes this node otherwise from the same inputs, {distance:.2e} away"));
        Some(found)
    }

    /// What the first other runtime that can run a segment makes of it, and its name.
    fn second(
        &self,
        way: usize,
        cut: &Cut,
        graph: &onnx::Model,
        segment: &Segment,
        seen: &Seen,
    ) -> Option<(String, Second)> {
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
