//! `mattock doctor`: checks a host before a run, and says what to mend.
//!
//! Each check is one line. A `warn` costs speed or comfort, a `fail` keeps the run from working here. What a check cannot
//! measure properly is not guessed.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use clap::Args;
use mattock_checkpoint::{Location, examine};
use mattock_collectives::Arena;
use mattock_coordinator::identity::JoinToken;
use mattock_coordinator::reach;
use mattock_worker::{Device, DeviceChoice, DeviceError, cpu_features};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use super::worker::TOKEN_VARIABLE;
use crate::exit::{Exit, Failure};
use crate::launch::address_towards_others;

/// What a datagram of Ethernet carries over IPv6, less what tunnels of clouds take.
const DATAGRAM_BYTES_WANTED: u16 = 1400;
/// Beyond it a control connection of some heartbeats a second suffers.
const ROUND_TRIP_SLOW: Duration = Duration::from_millis(200);
/// Of shared memory that is tried.
const SHARED_BYTES: usize = 64 << 20;
/// With less than this hardly any model trains.
const MEMORY_LOW_BYTES: u64 = 1 << 30;
/// A worker has a handful for itself, and some for each peer of its host.
const FILES_FEW: u64 = 1024;
/// Not even one run's processes get by with less.
const FILES_MIN: u64 = 128;
/// Beyond it a bucket slows down training that waits for its last checkpoint.
const BUCKET_SLOW: Duration = Duration::from_millis(500);
/// S3 refuses requests that are 15 minutes off; certificates are valid from minutes before they are made.
const CLOCK_OFF_MS: u64 = 5_000;
/// Beyond it S3 refuses.
const CLOCK_WRONG_MS: u64 = 600_000;

const EXAMPLES: &str = "\
Exit codes:
  0  nothing failed
  2  something did: mend it, each line says how

Examples:
  mattock doctor --checkpoints s3://bucket/prefix
  mattock doctor --token-file /shared/runs/first/token --json
";

/// Check this host before a run, and say what to mend
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// The join token of a run: checks the way to its coordinator; MATTOCK_TOKEN is read too
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// The coordinator's address, if it is not the one in the token
    #[arg(long, value_name = "ADDRESS")]
    pub coordinator: Option<SocketAddr>,
    /// Where checkpoints are to go: a folder, file:// or s3://bucket/prefix
    #[arg(long, value_name = "URL")]
    pub checkpoints: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    check: &'static str,
    verdict: Verdict,
    /// What was found.
    found: String,
    /// What to do; nothing where all is well.
    #[serde(skip_serializing_if = "String::is_empty")]
    mend: String,
}

impl Check {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Ok, found: found.into(), mend: String::new() }
    }

    fn warn(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warn, found: found.into(), mend: mend.into() }
    }

    fn fail(check: &'static str, found: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Fail, found: found.into(), mend: mend.into() }
    }

    fn line(&self) -> String {
        let Self { check, verdict, found, mend } = self;
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warn => "warn",
            Verdict::Fail => "fail",
        };
        let mend = if mend.is_empty() { String::new() } else { format!(" -> {mend}") };
        // An error may have several lines; a check has one.
        let text = format!("{found}{mend}").split_whitespace().collect::<Vec<&str>>().join(" ");
        format!("{verdict:<5} {check:<14} {text}")
    }
}

/// Runs `mattock doctor`; `out` is standard output.
///
/// # Errors
/// Bad input where something failed, and where a token or a location is none.
pub fn run(args: &DoctorArgs, out: &mut impl Write) -> Result<Exit, Failure> {
    let token = args.token()?;
    let location =
        args.checkpoints.as_deref().map(Location::parse).transpose().map_err(Failure::bad_input)?;
    let mut failed = 0;
    let mut tell = |checks: Vec<Check>| -> Result<(), Failure> {
        for check in checks {
            failed += usize::from(check.verdict == Verdict::Fail);
            let line = if args.json { serde_json::to_string(&check) } else { Ok(check.line()) };
            writeln!(out, "{}", line.map_err(Failure::internal)?).map_err(Failure::internal)?;
        }
        out.flush().map_err(Failure::internal)
    };
    tell(vec![processor(), device(), memory(), shared_memory(), open_files(), address_space(), address()])?;
    if let Some(token) = token {
        tell(coordinator(&token))?;
    }
    if let Some(location) = location {
        tell(bucket(&location))?;
    }
    if failed > 0 {
        return Err(Failure::bad_input(anyhow!("{failed} of the checks failed; each says what to mend")));
    }
    Ok(Exit::Done)
}

impl DoctorArgs {
    fn token(&self) -> Result<Option<JoinToken>, Failure> {
        let token = match (&self.token_file, std::env::var(TOKEN_VARIABLE)) {
            (Some(file), _) => Some(JoinToken::read(file)),
            (None, Ok(text)) => Some(JoinToken::parse(&text)),
            (None, Err(_)) => None,
        };
        match (token.transpose().map_err(Failure::bad_input)?, self.coordinator) {
            (Some(mut token), address) => {
                token.address = address.unwrap_or(token.address);
                Ok(Some(token))
            }
            (None, Some(_)) => Err(Failure::bad_input(anyhow!(
                "--coordinator needs the run's join token, for a coordinator answers nobody else: give --token-file"
            ))),
            (None, None) => Ok(None),
        }
    }
}

fn processor() -> Check {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    Check::ok("processor", format!("{cores} cores, {}", cpu_features()))
}

fn device() -> Check {
    const DRIVER: &str = "/proc/driver/nvidia/version";
    let driver = fs::read_to_string(DRIVER).ok();
    let driver = driver.as_deref().and_then(|text| text.lines().next());
    match (Device::find(DeviceChoice::Cuda(None), 0), driver) {
        (Ok(device), Some(driver)) => Check::ok("device", format!("{device}, {driver}")),
        (Ok(device), None) => Check::ok("device", device.to_string()),
        (Err(DeviceError::NotBuilt), None) => Check::ok("device", "the CPU; this build has no CUDA support"),
        (Err(_), None) => Check::ok("device", "the CPU; no NVIDIA driver is here"),
        (Err(error), Some(driver)) => {
            let mend = match error {
                DeviceError::NotBuilt => "build with `--features cuda` to use it",
                _ => "look at what `nvidia-smi` says, and whether this container was given the devices",
            };
            Check::warn("device", format!("{driver}, but {error}"), mend)
        }
    }
}

/// What this process may use: what is free, and what its container allows.
fn memory() -> Check {
    let kib = |text: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    let free = fs::read_to_string("/proc/meminfo").ok().and_then(|text| kib(&text)).map(|kib| kib << 10);
    let limit =
        fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    let bytes = [free, limit].into_iter().flatten().min();
    match bytes {
        None => Check::warn("memory", "/proc/meminfo does not say how much is free", "mount /proc"),
        Some(bytes) if bytes < MEMORY_LOW_BYTES => {
            let mend = "give the container more, or end what else runs: a worker that runs out is killed";
            Check::warn("memory", format!("{} MiB", bytes >> 20), mend)
        }
        Some(bytes) => Check::ok("memory", format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))),
    }
}

fn shared_memory() -> Check {
    let tried = Arena::new(SHARED_BYTES)
        .map_err(|error| error.to_string())
        .and_then(|arena| arena.buffer::<i64>(SHARED_BYTES / 16).map_err(|error| error.to_string()));
    match tried {
        Ok(_) => Check::ok("shared memory", "sealed memory files work"),
        Err(error) => {
            let mend = "allow memfd_create in the container's seccomp profile; until then workers of a host use the \
                network (--transport quic)";
            Check::warn("shared memory", error, mend)
        }
    }
}

fn open_files() -> Check {
    let limit = getrlimit(Resource::Nofile).current;
    let found = limit.map_or("no limit".to_owned(), |limit| format!("{limit} at once"));
    let mend = "raise it: `ulimit -n 65536`, LimitNOFILE= of the service, or limits.conf";
    match limit {
        Some(limit) if limit < FILES_MIN => Check::fail("open files", found, mend),
        Some(limit) if limit < FILES_FEW => Check::warn("open files", found, mend),
        _ => Check::ok("open files", found),
    }
}

/// Buffers are mapped large and filled as needed, so a limit of addresses is met long before one of memory.
fn address_space() -> Check {
    match getrlimit(Resource::As).current {
        None => Check::ok("address space", "no limit"),
        Some(limit) => Check::warn(
            "address space",
            format!("{} MiB at most", limit >> 20),
            "lift it: `ulimit -v unlimited`; shared buffers are mapped larger than they are filled",
        ),
    }
}

fn address() -> Check {
    match address_towards_others() {
        Ok(address) if address.is_loopback() => Check::warn(
            "address",
            format!("others are told {address}, which is this machine only"),
            "for several machines say which address they reach: train --listen ADDRESS:0",
        ),
        Ok(address) => Check::ok("address", format!("others are told {address}")),
        Err(error) => {
            Check::warn("address", error.to_string(), "only a run on this machine works without it")
        }
    }
}

fn coordinator(token: &JoinToken) -> Vec<Check> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut checks = Vec::new();
    if now >= token.expires {
        checks.push(Check::fail(
            "join token",
            format!("it expired {} s ago by this host's clock", now - token.expires),
            "set the clock if it is wrong; else start the coordinator again for a new token",
        ));
    }
    match reach(token, token.timeout()) {
        Ok(reach) => {
            let found = format!("{} answers in {:.1?}, we are {}", token.address, reach.round_trip, reach.local_ip);
            checks.push(match reach.round_trip > ROUND_TRIP_SLOW {
                true => Check::warn("coordinator", found, "raise [elastic] timeout, or move the coordinator nearer"),
                false => Check::ok("coordinator", found),
            });
            let found = format!("datagrams of {} bytes come through", reach.datagram_bytes);
            checks.push(match reach.datagram_bytes < DATAGRAM_BYTES_WANTED {
                true => Check::warn(
                    "path MTU",
                    found,
                    "look for a tunnel or VPN with a small MTU on the way; it works, with more packets",
                ),
                false => Check::ok("path MTU", found),
            });
        }
        Err(error) => checks.push(Check::fail(
            "coordinator",
            error.to_string(),
            format!(
                "let UDP through from here to {} and back (firewall, security group, network policy); between workers \
                 it must pass on any port",
                token.address
            ),
        )),
    }
    checks
}

fn bucket(location: &Location) -> Vec<Check> {
    let found = match examine(location) {
        Ok(found) => found,
        Err(error) => {
            let mend = "check the address, the credentials, and that they may put, get, list and delete";
            return vec![Check::fail("checkpoints", error.to_string(), mend)];
        }
    };
    let times =
        format!("{location}: an object is created in {:.1?}, read in {:.1?}", found.create, found.read);
    let slow = found.create.max(found.read) > BUCKET_SLOW;
    let latency = match slow {
        true => Check::warn("checkpoints", times, "use a store in this region"),
        false => Check::ok("checkpoints", times),
    };
    let conditional = match found.conditional {
        true => Check::ok("create-only put", "a second object of one name is refused"),
        false => Check::warn(
            "create-only put",
            "this store lets a second writer replace an object",
            "give each run a prefix of its own; nothing else keeps two runs apart there",
        ),
    };
    vec![latency, conditional, clock(found.clock_ahead_ms)]
}

fn clock(ahead_ms: i64) -> Check {
    let direction = if ahead_ms < 0 { "behind" } else { "ahead of" };
    let found = format!("{:.1} s {direction} the store's", ahead_ms.unsigned_abs() as f64 / 1000.0);
    let mend = "set it by NTP (chronyd, systemd-timesyncd)";
    match ahead_ms.unsigned_abs() {
        off if off <= CLOCK_OFF_MS => Check::ok("clock", found),
        off if off <= CLOCK_WRONG_MS => Check::warn("clock", found, mend),
        _ => Check::fail("clock", format!("{found}, and S3 refuses such requests"), mend),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_one_line_that_says_what_to_do() {
        let check = Check::fail("open files", "64\nat once", "raise it");
        assert_eq!(check.line(), "fail  open files     64 at once -> raise it");
        assert_eq!(Check::ok("clock", "0.0 s ahead").line(), "ok    clock          0.0 s ahead");
        let json = serde_json::to_string(&check).unwrap();
        let pinned = r#"{"check":"open files","verdict":"fail","found":"64\nat once","mend":"raise it"}"#;
        assert_eq!(json, pinned);
    }

    #[test]
    fn a_clock_is_judged_by_how_far_it_is_off() {
        for (ahead_ms, verdict, words) in [
            (0, Verdict::Ok, "0.0 s ahead of"),
            (-4_000, Verdict::Ok, "4.0 s behind"),
            (30_000, Verdict::Warn, "30.0 s ahead of"),
            (-3_600_000, Verdict::Fail, "S3 refuses"),
            (i64::MIN, Verdict::Fail, "behind"),
        ] {
            let check = clock(ahead_ms);
            assert_eq!(check.verdict, verdict, "{ahead_ms}");
            assert!(check.found.contains(words), "{}", check.found);
        }
    }
}
