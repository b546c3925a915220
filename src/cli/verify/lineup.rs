//! Which adapters a graph can have active, by its own metadata, and what its inputs are then given.

use super::*;
use crate::parity::Together;
use crate::runtime::NamedGiven;

/// The models that a graph is, by what its inputs are given: one, unless it has slots or a bank.
pub(super) struct Lineup {
    /// Their names: those of the adapters that act.
    pub(super) names: Vec<String>,
    /// The adapters of each.
    sets: Vec<Vec<usize>>,
    /// What the inputs of each are given.
    pub(super) given: Vec<NamedGiven>,
    /// Whether rows of one batch may be of different models.
    pub(super) by_row: bool,
}

/// Adapters that can be switched on, and what the graph is given for it.
type Choice = (usize, NamedGiven);

impl Lineup {
    /// What the folds of a graph allow with the adapters that are at hand. Slots hold any adapter, rows of a bank and baked tensors
    /// that of their name; where there is one of each, names do not matter.
    pub(super) fn of(graph: &Graph, folder: &Path, adapters: &[Adapted]) -> Result<Self> {
        let folds = Record::all(graph)?;
        let alone = folds.len() == 1 && adapters.len() == 1;
        let named = |fold: &Record, name: &String| {
            let only = (alone && fold.adapters.len() == 1).then_some(0);
            adapters.iter().position(|adapter| adapter.name == *name).or(only)
        };
        let mut off = NamedGiven::new();
        let (mut always, mut switches): (Vec<usize>, Vec<Vec<Choice>>) = (Vec::new(), Vec::new());
        let mut slots = None;
        for fold in &folds {
            let places: Vec<Option<usize>> = fold.adapters.iter().map(|name| named(fold, name)).collect();
            match fold.emission {
                Emission::Baked => always.extend(places.into_iter().flatten()),
                Emission::Slot => slots = Some(fold),
                Emission::Bank => {
                    let input = fold.input_name(ADAPTER_IDS);
                    off.push((input.clone(), Given::EveryRow(0)));
                    let row = |(place, row): (Option<usize>, i64)| {
                        Some((place?, vec![(input.clone(), Given::EveryRow(row))]))
                    };
                    switches.push(places.into_iter().zip(1..).filter_map(row).collect());
                }
            }
        }
        let taken =
            |place: &usize| always.contains(place) || switches.iter().flatten().any(|(other, _)| other == place);
        let free: Vec<usize> = (0..adapters.len()).filter(|place| !taken(place)).collect();
        if slots.is_some() {
            let values = |place: usize| {
                let adapter = adapters.get(place).map(|adapter| &adapter.adapter);
                let file = adapter.map(|adapter| slot_values(graph, folder, adapter)).transpose()?;
                let value = |value: crate::fold::onnx_adapter::AdapterParameter| {
                    Ok((value.name, Given::from_le_bytes(value.data_type.code(), &value.dims, &value.bytes)?))
                };
                let values = file.into_iter().flat_map(|file| file.parameters).map(value);
                Ok((place, values.collect::<runtime::Result<NamedGiven>>()?))
            };
            switches.push(free.into_iter().map(values).collect::<Result<_>>()?);
        } else if let [first, ..] = &free[..]
            && (!folds.is_empty() || adapters.len() > 1)
        {
            let known: Vec<&str> = folds.iter().flat_map(|fold| &fold.adapters).map(String::as_str).collect();
            let name = adapters.get(*first).map(|adapter| adapter.name.as_str()).unwrap_or_default();
            let help = match &known[..] {
                [] => "its metadata names none: give one --adapter".into(),
                known => format!("its adapters are {}; say which is which as --adapter NAME=FOLDER", known.join(", ")),
            };
            return Err(usage(format!("the graph does not know the adapter `{name}`"), help));
        } else {
            always.extend(free);
        }
        switches.retain(|choices| !choices.is_empty());
        let by_row = folds.iter().any(|fold| fold.emission == Emission::Bank);
        let lineup = Self { names: Vec::new(), sets: Vec::new(), given: Vec::new(), by_row };
        Ok(lineup.with(&always, &switches, &off, adapters))
    }

    /// The first choice of every switch together, each choice alone, and nothing switched on.
    fn with(
        mut self,
        always: &[usize],
        switches: &[Vec<Choice>],
        off: &[(String, Given)],
        adapters: &[Adapted],
    ) -> Self {
        let mut models: Vec<Vec<&Choice>> = Vec::new();
        if switches.len() > 1 {
            models.push(switches.iter().filter_map(|choices| choices.first()).collect());
        }
        models.extend(switches.iter().flatten().map(|choice| vec![choice]));
        models.push(Vec::new());
        for choices in models {
            let mut given: NamedGiven = choices.iter().flat_map(|(_, given)| given.clone()).collect();
            given.extend(
                off.iter()
                    .filter(|(name, _)| choices.iter().all(|(_, given)| given.iter().all(|(n, _)| n != name)))
                    .cloned(),
            );
            let set: Vec<usize> = always.iter().copied().chain(choices.iter().map(|(place, _)| *place)).collect();
            let names = set.iter().filter_map(|place| adapters.get(*place)).map(|adapter| adapter.name.as_str());
            let name = names.collect::<Vec<_>>().join("+");
            self.names.push(if name.is_empty() { "base".into() } else { name });
            self.sets.push(set);
            self.given.push(given);
        }
        self
    }

    /// The base model alone.
    pub(super) fn base() -> Self {
        Self { names: vec!["base".into()], sets: vec![Vec::new()], given: vec![NamedGiven::new()], by_row: false }
    }

    /// What the inputs are given so that nothing that can be switched acts, whatever model is asked for.
    pub(super) fn off(&self) -> Vec<NamedGiven> {
        vec![self.given.last().cloned().unwrap_or_default(); self.given.len()]
    }

    /// What acts at the sites, by model.
    pub(super) fn hooks(
        &self,
        adapters: &[Adapted],
        spec: &crate::base::DecoderSpec,
        device: &Device,
    ) -> Result<Vec<Together>> {
        let hook =
            |place: &usize| Ok(adapters.get(*place).map(|adapter| adapter.adapter.hook(spec, device)).transpose()?);
        let together = |set: &Vec<usize>| {
            Ok(Together::new(set.iter().filter_map(|place| hook(place).transpose()).collect::<Result<_>>()?))
        };
        self.sets.iter().map(together).collect()
    }
}
