//! Where this process is in a launch over several machines: which node of how many.
//!
//! One process a node: it starts that node's workers itself. Flags decide where both are given; else every launcher whose
//! variables are there says what it says, and all must say the same.
//!
//! | launcher | node | of | processes on this node |
//! |---|---|---|---|
//! | torchrun | `GROUP_RANK`, else `RANK` | `GROUP_WORLD_SIZE`, else `WORLD_SIZE` | `LOCAL_WORLD_SIZE` |
//! | Slurm (srun) | `SLURM_PROCID` | `SLURM_STEP_NUM_TASKS` | tasks over `SLURM_STEP_NUM_NODES` |
//! | Kubernetes Indexed Job | `JOB_COMPLETION_INDEX` | `--nodes`, for no variable says it | |
//! | Open MPI | `OMPI_COMM_WORLD_RANK` | `OMPI_COMM_WORLD_SIZE` | `OMPI_COMM_WORLD_LOCAL_SIZE` |
//! | MPICH, Intel MPI | `PMI_RANK` | `PMI_SIZE` | `MPI_LOCALNRANKS` |
//!
//! What a batch script sees of Slurm before `srun` has started anything says nothing of a place: that is one machine.
//!
//! Deliberately absent: reading the environment, which comes in as a function, and host names.

use std::fmt;

/// What this process was told by flags.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flags {
    /// `--node-rank`.
    pub node_rank: Option<u32>,
    /// `--nodes`, or `MATTOCK_NODES`.
    pub nodes: Option<u32>,
}

/// Which node of how many this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// From 0; node 0 has the coordinator.
    pub rank: u32,
    /// At least one.
    pub nodes: u32,
    /// Who says so.
    pub why: String,
}

/// Why nobody can tell.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// A variable holds no number.
    #[error(
        "{variable} is {value:?} in the environment, and should be a number: mend or unset it, or {REMEDY}"
    )]
    NoNumber {
        /// Which.
        variable: &'static str,
        /// What it holds.
        value: String,
    },
    /// Two launchers say different things.
    #[error(
        "{one}, but {other}: {REMEDY}, or unset the variables of the one that did not start this process; --nodes 1 \
         runs on this machine alone"
    )]
    Disagree {
        /// What one says.
        one: String,
        /// What another says.
        other: String,
    },
    /// Several processes were started on one node.
    #[error(
        "{launcher} starts {processes} processes on this node ({variables}), and mattock takes one: start it with \
         {instead}, and give the number of workers of each node with --workers"
    )]
    Several {
        /// Who did.
        launcher: &'static str,
        /// How many.
        processes: u32,
        /// Who says so.
        variables: String,
        /// How it is told to start one.
        instead: &'static str,
    },
    /// A rank without a number of nodes.
    #[error("{said}, and nothing says of how many: give --nodes N, or set MATTOCK_NODES")]
    OfHowMany {
        /// Who says what.
        said: String,
    },
    /// A number of nodes without a rank.
    #[error("--nodes {nodes}, and nothing says which of them this is: give --node-rank R, from 0 to {}", nodes.saturating_sub(1))]
    Which {
        /// How many.
        nodes: u32,
    },
    /// There is no such node.
    #[error("node {rank} of {nodes} ({why}) does not exist: ranks go from 0 to the number of nodes less one")]
    Outside {
        /// Which.
        rank: u32,
        /// How many.
        nodes: u32,
        /// Who says so.
        why: String,
    },
}

/// What settles it.
const REMEDY: &str = "say it with --node-rank R --nodes N";

/// What one launcher says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Claim {
    rank: u32,
    nodes: Option<u32>,
    why: String,
}

impl Place {
    /// Finds the place from flags and the environment, which `variable` looks up.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn find(flags: Flags, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, PlaceError> {
        match (flags.node_rank, flags.nodes) {
            (Some(rank), Some(nodes)) => {
                return Self::checked(rank, nodes, format!("--node-rank {rank} --nodes {nodes}"));
            }
            (Some(rank), None) => {
                return Err(PlaceError::OfHowMany { said: format!("--node-rank is {rank}") });
            }
            (None, Some(0)) => return Self::checked(0, 0, "--nodes 0".to_owned()),
            (None, Some(1)) => return Ok(Self::alone("--nodes 1")),
            (None, _) => {}
        }
        let environment = Environment(variable);
        let launchers =
            [Environment::torchrun, Environment::slurm, Environment::kubernetes, Environment::mpi];
        let mut claims = Vec::new();
        for launcher in launchers {
            claims.extend(launcher(&environment)?);
        }
        Self::agreed(&claims, flags.nodes)
    }

    /// Whether the coordinator is to run here.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    fn alone(why: &str) -> Self {
        Self { rank: 0, nodes: 1, why: why.to_owned() }
    }

    fn checked(rank: u32, nodes: u32, why: String) -> Result<Self, PlaceError> {
        if rank < nodes {
            Ok(Self { rank, nodes, why })
        } else {
            Err(PlaceError::Outside { rank, nodes, why })
        }
    }

    /// What all launchers say.
    fn agreed(claims: &[Claim], nodes: Option<u32>) -> Result<Self, PlaceError> {
        let Some(first) = claims.first() else {
            return match nodes {
                Some(nodes) => Err(PlaceError::Which { nodes }),
                None => Ok(Self::alone("no launcher's variables are set")),
            };
        };
        let named = claims.iter().find_map(|claim| Some((claim.nodes?, &claim.why)));
        for claim in claims {
            if claim.rank != first.rank
                || claim.nodes.is_some_and(|nodes| named.is_some_and(|(n, _)| n != nodes))
            {
                let one = if claim.rank == first.rank {
                    named.map_or(&first.why, |(_, why)| why)
                } else {
                    &first.why
                };
                return Err(PlaceError::Disagree { one: one.clone(), other: claim.why.clone() });
            }
        }
        let count = match (named, nodes) {
            (Some((named, why)), Some(nodes)) if named != nodes => {
                return Err(PlaceError::Disagree {
                    one: format!("--nodes says {nodes}"),
                    other: why.clone(),
                });
            }
            (Some((named, _)), _) => named,
            (None, Some(nodes)) => nodes,
            (None, None) => return Err(PlaceError::OfHowMany { said: first.why.clone() }),
        };
        let whys: Vec<&str> = claims.iter().map(|claim| claim.why.as_str()).collect();
        Self::checked(first.rank, count, whys.join(", and "))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} of {} ({})", self.rank, self.nodes, self.why)
    }
}

/// The environment, by launcher.
struct Environment<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Environment<'_> {
    fn number(&self, variable: &'static str) -> Result<Option<u32>, PlaceError> {
        let Some(value) = (self.0)(variable) else { return Ok(None) };
        match value.trim().parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(PlaceError::NoNumber { variable, value }),
        }
    }

    /// The first of the variables that is set, with its name.
    fn either(&self, variables: [&'static str; 2]) -> Result<Option<(&'static str, u32)>, PlaceError> {
        for variable in variables {
            if let Some(number) = self.number(variable)? {
                return Ok(Some((variable, number)));
            }
        }
        Ok(None)
    }

    fn torchrun(&self) -> Result<Option<Claim>, PlaceError> {
        let (rank, nodes) =
            (self.either(["GROUP_RANK", "RANK"])?, self.either(["GROUP_WORLD_SIZE", "WORLD_SIZE"])?);
        let (Some((of_rank, rank)), Some((of_nodes, nodes))) = (rank, nodes) else { return Ok(None) };
        let processes = self.number("LOCAL_WORLD_SIZE")?.unwrap_or(1);
        if processes > 1 {
            return Err(PlaceError::Several {
                launcher: "torchrun",
                processes,
                variables: format!("LOCAL_WORLD_SIZE={processes}"),
                instead: "--nproc-per-node 1",
            });
        }
        Ok(Some(claim("torchrun", (of_rank, rank), Some((of_nodes, nodes)))))
    }

    fn slurm(&self) -> Result<Option<Claim>, PlaceError> {
        let tasks = self.number("SLURM_STEP_NUM_TASKS")?;
        let (Some(rank), Some(tasks)) = (self.number("SLURM_PROCID")?, tasks) else { return Ok(None) };
        let nodes = self.number("SLURM_STEP_NUM_NODES")?.unwrap_or(tasks);
        if tasks != nodes {
            return Err(PlaceError::Several {
                launcher: "Slurm",
                processes: tasks.div_ceil(nodes.max(1)),
                variables: format!("SLURM_STEP_NUM_TASKS={tasks}, SLURM_STEP_NUM_NODES={nodes}"),
                instead: "srun --ntasks-per-node=1",
            });
        }
        Ok(Some(claim("Slurm", ("SLURM_PROCID", rank), Some(("SLURM_STEP_NUM_TASKS", tasks)))))
    }

    fn kubernetes(&self) -> Result<Option<Claim>, PlaceError> {
        let rank = self.number("JOB_COMPLETION_INDEX")?;
        Ok(rank.map(|rank| claim("Kubernetes", ("JOB_COMPLETION_INDEX", rank), None)))
    }

    fn mpi(&self) -> Result<Option<Claim>, PlaceError> {
        let kinds = [
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
            ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
        ];
        for (of_rank, of_nodes, of_processes) in kinds {
            let (Some(rank), Some(nodes)) = (self.number(of_rank)?, self.number(of_nodes)?) else { continue };
            let processes = self.number(of_processes)?.unwrap_or(1);
            if processes > 1 {
                return Err(PlaceError::Several {
                    launcher: "MPI",
                    processes,
                    variables: format!("{of_processes}={processes}"),
                    instead: "one process a node (mpirun --map-by ppr:1:node, or -ppn 1)",
                });
            }
            return Ok(Some(claim("MPI", (of_rank, rank), Some((of_nodes, nodes)))));
        }
        Ok(None)
    }
}

fn claim(launcher: &str, (of_rank, rank): (&str, u32), count: Option<(&str, u32)>) -> Claim {
    let of = count.map_or(String::new(), |(variable, nodes)| format!(", {variable}={nodes}"));
    Claim { rank, nodes: count.map(|(_, nodes)| nodes), why: format!("{launcher} says {of_rank}={rank}{of}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(flags: (Option<u32>, Option<u32>), variables: &str) -> Result<Place, PlaceError> {
        let pairs: Vec<(&str, &str)> =
            variables.split_whitespace().map(|pair| pair.split_once('=').unwrap()).collect();
        let look_up =
            |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Place::find(Flags { node_rank: flags.0, nodes: flags.1 }, &look_up)
    }

    /// What a real `srun` of two nodes sets, as far as it could be taken for a place.
    const SRUN: &str = "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_NNODES=2 SLURM_NODEID=1 SLURM_LOCALID=0 \
        SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_JOB_ID=7 SLURM_STEP_ID=0";
    const TORCHRUN: &str = "RANK=1 WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 GROUP_RANK=1 \
        GROUP_WORLD_SIZE=2 ROLE_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500";

    #[test]
    fn each_launcher_says_where_a_process_is_and_is_named() {
        for (variables, nodes, who) in [
            (SRUN, None, "Slurm says SLURM_PROCID=1, SLURM_STEP_NUM_TASKS=2"),
            (TORCHRUN, None, "torchrun says GROUP_RANK=1, GROUP_WORLD_SIZE=2"),
            ("RANK=1 WORLD_SIZE=2", None, "torchrun says RANK=1, WORLD_SIZE=2"),
            ("JOB_COMPLETION_INDEX=1", Some(2), "Kubernetes says JOB_COMPLETION_INDEX=1"),
            (
                "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=1",
                None,
                "MPI says OMPI",
            ),
            ("PMI_RANK=1 PMI_SIZE=2", None, "MPI says PMI_RANK=1, PMI_SIZE=2"),
        ] {
            let place = find((None, nodes), variables).unwrap();
            assert_eq!((place.rank, place.nodes), (1, 2), "{variables}");
            assert!(place.why.starts_with(who), "{place}");
            assert!(!place.leads());
        }
    }

    #[test]
    fn without_a_launcher_there_is_one_machine() {
        // What a batch script sees before it starts anything.
        let batch = "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NODEID=0 SLURM_NNODES=4 SLURM_NTASKS=4";
        for variables in ["", batch, "PMI_RANK=1", "RANK=3", "WORLD_SIZE=4", "LOCAL_RANK=0"] {
            let place = find((None, None), variables).unwrap();
            assert_eq!((place.rank, place.nodes), (0, 1), "{variables}");
            assert!(place.leads());
        }
    }

    #[test]
    fn flags_decide_where_both_are_given() {
        let place = find((Some(2), Some(3)), &format!("{SRUN} RANK=many")).unwrap();
        assert_eq!((place.rank, place.nodes, place.why.as_str()), (2, 3, "--node-rank 2 --nodes 3"));
        let alone = find((None, Some(1)), SRUN).unwrap();
        assert_eq!((alone.rank, alone.nodes), (0, 1));
    }

    #[test]
    fn launchers_that_agree_are_all_named() {
        let place = find((None, None), &format!("{SRUN} {TORCHRUN} PMI_RANK=1 PMI_SIZE=2")).unwrap();
        assert_eq!((place.rank, place.nodes), (1, 2));
        for launcher in ["torchrun", "Slurm", "MPI"] {
            assert!(place.why.contains(launcher), "{place}");
        }
        assert_eq!(find((None, None), &format!("{SRUN} JOB_COMPLETION_INDEX=1")).unwrap().nodes, 2);
    }

    #[track_caller]
    fn refused(flags: (Option<u32>, Option<u32>), variables: &str, said: &[&str]) {
        let message = find(flags, variables).unwrap_err().to_string();
        for words in said {
            assert!(message.contains(words), "no {words:?} in {message}");
        }
    }

    #[test]
    fn two_that_disagree_are_both_named_with_what_to_do() {
        let todo = "--node-rank R --nodes N";
        let other_rank = "OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2";
        refused(
            (None, None),
            &format!("{SRUN} {other_rank}"),
            &["SLURM_PROCID=1", "OMPI_COMM_WORLD_RANK=0", todo],
        );
        let other_count = "RANK=1 WORLD_SIZE=3";
        refused(
            (None, None),
            &format!("{SRUN} {other_count}"),
            &["SLURM_STEP_NUM_TASKS=2", "WORLD_SIZE=3", todo],
        );
        refused((None, Some(3)), SRUN, &["--nodes says 3", "SLURM_STEP_NUM_TASKS=2", todo]);
        // The first names no count, the other two differ.
        let three = "JOB_COMPLETION_INDEX=1 PMI_RANK=1 PMI_SIZE=3";
        refused((None, None), &format!("{SRUN} {three}"), &["SLURM_STEP_NUM_TASKS=2", "PMI_SIZE=3"]);
        refused((None, Some(2)), "JOB_COMPLETION_INDEX=0 RANK=1 WORLD_SIZE=2", &["Kubernetes", "torchrun"]);
    }

    #[test]
    fn several_processes_on_a_node_are_refused_with_the_launchers_own_flag() {
        let torchrun = "RANK=9 WORLD_SIZE=16 LOCAL_RANK=1 LOCAL_WORLD_SIZE=8 GROUP_RANK=1 GROUP_WORLD_SIZE=2";
        refused((None, None), torchrun, &["8 processes", "--nproc-per-node 1", "--workers"]);
        let srun = "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=8 SLURM_STEP_NUM_NODES=4";
        refused((None, None), srun, &["2 processes", "--ntasks-per-node=1"]);
        let mpi = "OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_SIZE=2";
        refused((None, None), mpi, &["2 processes", "ppr:1:node"]);
        refused((None, None), "PMI_RANK=3 PMI_SIZE=4 MPI_LOCALNRANKS=2", &["MPI_LOCALNRANKS=2"]);
    }

    #[test]
    fn half_a_place_is_none() {
        refused((Some(1), None), "", &["--node-rank is 1", "--nodes N"]);
        refused((None, Some(4)), "", &["--nodes 4", "--node-rank R, from 0 to 3"]);
        refused((None, None), "JOB_COMPLETION_INDEX=2", &["JOB_COMPLETION_INDEX=2", "MATTOCK_NODES"]);
        refused((Some(4), Some(4)), "", &["node 4 of 4"]);
        refused((Some(0), Some(0)), "", &["node 0 of 0"]);
        refused((None, None), "PMI_RANK=5 PMI_SIZE=2", &["node 5 of 2"]);
        refused((None, Some(2)), "JOB_COMPLETION_INDEX=2", &["node 2 of 2"]);
        refused((None, None), "RANK=first WORLD_SIZE=2", &["RANK", "first"]);
        refused((None, None), "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=-1", &["SLURM_STEP_NUM_TASKS", "-1"]);
        refused((None, Some(0)), "", &["--nodes 0"]);
    }
}
