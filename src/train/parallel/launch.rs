//! What a launcher tells each of its processes, in environment variables.

use super::{Error, Result};

/// A process among those of one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Number of this process, from 0.
    pub rank: usize,
    /// Number of processes.
    pub world_size: usize,
    /// Number of this process among those of its machine.
    pub local_rank: usize,
    /// Host of process 0.
    pub host: String,
    /// Port on which process 0 listens.
    pub port: u16,
}

/// Names of one launcher's variables: its own name, rank, number of processes, rank on the machine.
const LAUNCHERS: [(&str, &str, &str, &str); 4] = [
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    // of the step that srun starts: in a batch script itself only the job's variables are set
    ("srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
];

/// The port where no launcher names one, as PyTorch has it.
const PORT: u16 = 29500;

impl Launch {
    /// What the environment says; `None` for a process on its own.
    ///
    /// # Errors
    /// When a variable is no number, contradicts another, or the host of process 0 is not said.
    pub fn from_env() -> Result<Option<Self>> {
        Self::of(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn of(var: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        let Some((launcher, rank_name, size_name, local_name)) =
            LAUNCHERS.into_iter().find(|(_, rank, size, _)| var(rank).is_some() && var(size).is_some())
        else {
            return Ok(None);
        };
        let number = |name: &'static str| {
            let Some(text) = var(name) else { return Ok(None) };
            text.parse::<usize>().map(Some).map_err(|_| Error::Launch { name, why: format!("is `{text}`, no number") })
        };
        let (rank, world_size) = (number(rank_name)?.unwrap_or(0), number(size_name)?.unwrap_or(1));
        if rank >= world_size {
            let why = format!("is {rank}, but {size_name} is {world_size}: ranks count from 0");
            return Err(Error::Launch { name: rank_name, why });
        }
        if world_size == 1 {
            return Ok(None);
        }
        let local_rank = number(local_name)?.unwrap_or(0);
        let on_one_machine = ["OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "LOCAL_WORLD_SIZE"]
            .into_iter()
            .any(|name| var(name).and_then(|v| v.parse().ok()) == Some(world_size));
        let host = var("MASTER_ADDR")
            .or_else(|| {
                (launcher == "srun").then(|| var("SLURM_STEP_NODELIST").map(|list| first_host(&list))).flatten()
            })
            .or_else(|| on_one_machine.then(|| "127.0.0.1".to_owned()));
        let Some(host) = host else {
            let why = format!(
                "is not set, and {launcher} does not say on which machine process 0 runs: set it to that machine's address"
            );
            return Err(Error::Launch { name: "MASTER_ADDR", why });
        };
        let port = match number("MASTER_PORT")? {
            None => PORT,
            // torchrun keeps a store of its own there
            Some(port) if var("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True") => port_number(port + 1)?,
            Some(port) => port_number(port)?,
        };
        Ok(Some(Self { rank, world_size, local_rank, host, port }))
    }
}

fn port_number(port: usize) -> Result<u16> {
    match u16::try_from(port) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(Error::Launch { name: "MASTER_PORT", why: format!("is {port}, no port that can be used") }),
    }
}

/// The first machine of Slurm's short form: `gpu[03-05,9],login` begins with `gpu03`.
fn first_host(list: &str) -> String {
    let (name, rest) = list.split_at(list.find(['[', ',']).unwrap_or(list.len()));
    match rest.strip_prefix('[') {
        Some(numbers) => {
            let end = numbers.find(['-', ',', ']']).unwrap_or(numbers.len());
            format!("{name}{}", &numbers[..end])
        }
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(vars: &[(&str, &str)]) -> Result<Option<Launch>> {
        Launch::of(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn launchers_are_understood() {
        let launch = |rank, world_size, local_rank, host: &str, port| {
            Some(Launch { rank, world_size, local_rank, host: host.into(), port })
        };
        let torchrun =
            [("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "4000")];
        assert_eq!(of(&torchrun).unwrap(), launch(3, 4, 1, "a", 4000));
        let with_agent = [&torchrun[..], &[("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat();
        assert_eq!(of(&with_agent).unwrap(), launch(3, 4, 1, "a", 4001));
        let mpirun = [
            ("OMPI_COMM_WORLD_RANK", "1"),
            ("OMPI_COMM_WORLD_SIZE", "2"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
        ];
        assert_eq!(of(&mpirun).unwrap(), launch(1, 2, 1, "127.0.0.1", PORT));
        let srun = [
            ("SLURM_PROCID", "0"),
            ("SLURM_STEP_NUM_TASKS", "16"),
            ("SLURM_LOCALID", "0"),
            ("SLURM_STEP_NODELIST", "gpu[03-04]"),
        ];
        assert_eq!(of(&srun).unwrap(), launch(0, 16, 0, "gpu03", PORT));
        // a batch script's own process
        assert_eq!(of(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "16")]).unwrap(), None);
        assert_eq!(of(&[("RANK", "0"), ("WORLD_SIZE", "1")]).unwrap(), None);
    }

    #[test]
    fn contradictions_are_errors() {
        for (vars, wanted) in [
            (vec![("RANK", "two"), ("WORLD_SIZE", "4")], "`RANK` is `two`"),
            (vec![("RANK", "4"), ("WORLD_SIZE", "4")], "ranks count from 0"),
            (vec![("RANK", "1"), ("WORLD_SIZE", "4")], "`MASTER_ADDR` is not set"),
            (vec![("RANK", "1"), ("WORLD_SIZE", "4"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "70000")], "no port"),
        ] {
            let error = of(&vars).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn the_first_host_of_a_list() {
        for (list, host) in
            [("gpu[03-05,9],login", "gpu03"), ("a,b", "a"), ("one", "one"), ("n[7]", "n7"), ("n[1,3]", "n1")]
        {
            assert_eq!(first_host(list), host);
        }
    }
}
