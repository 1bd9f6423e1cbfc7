//! Processes of other VMMs that are compared with: started with a log, asked over their API, which is HTTP over a Unix
//! socket, and ended when they are dropped.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use serde_json::Value;

/// A request, or whatever else a peer is asked for, that takes longer has gone wrong.
pub const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Between two looks whether the socket is there.
const RETRY: Duration = Duration::from_micros(100);
/// An answer whose body is longer is not one of a VMM.
const BODY_MAX: u64 = 1 << 20;
/// So many lines of a log are shown.
const LOG_LINES: usize = 20;

/// A VMM that is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Peer {
    Firecracker,
    CloudHypervisor,
}

impl Peer {
    pub const ALL: [Self; 2] = [Self::Firecracker, Self::CloudHypervisor];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Firecracker => "Firecracker",
            Self::CloudHypervisor => "Cloud Hypervisor",
        }
    }

    /// Its name in reports and of files.
    pub fn key(self) -> &'static str {
        match self {
            Self::Firecracker => "firecracker",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }

    /// Environment variable with the path of its binary.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Firecracker => "PICOVM_BENCH_FIRECRACKER",
            Self::CloudHypervisor => "PICOVM_BENCH_CLOUD_HYPERVISOR",
        }
    }

    /// Where its binary lies, as the environment says; nowhere if it is not to be compared with.
    pub fn given(self) -> Option<PathBuf> {
        std::env::var_os(self.variable())
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    }
}

/// A running one. It is killed when this is dropped: it has nothing to lose.
pub struct Process {
    peer: Peer,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts it. Its standard error goes to the file `log`, and with it standard output if `output` is `None`.
    pub fn start(
        peer: Peer,
        command: &mut Command,
        output: Option<Stdio>,
        log: &Path,
    ) -> anyhow::Result<Self> {
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let output = match output {
            Some(output) => output,
            None => file.try_clone().context("cannot duplicate a descriptor")?.into(),
        };
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        Ok(Self {
            peer,
            child,
            log: log.to_owned(),
        })
    }

    /// The other end of its standard output, if that was to be a pipe; once.
    pub fn output(&mut self) -> anyhow::Result<ChildStdout> {
        self.child
            .stdout
            .take()
            .with_context(|| format!("{}'s standard output is not a pipe", self.peer.name()))
    }

    /// Connects to the socket of its API, as soon as it is there.
    pub fn connect(&mut self, socket: &Path) -> anyhow::Result<Api> {
        let start = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Api::new(self.peer, stream),
                Err(error) => {
                    let peer = self.peer.name();
                    let what = || format!("cannot reach {peer}'s API at {}", socket.display());
                    if start.elapsed() > ANSWER_MAX {
                        return Err(error).with_context(what);
                    }
                    self.must_run().with_context(what)?;
                }
            }
            std::thread::sleep(RETRY);
        }
    }

    /// Fails if it has ended.
    pub fn must_run(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}", self.peer.name()),
        }
    }

    /// `result`, and if that is an error, with the end of the log, which mostly says why.
    pub fn explain<T>(&self, result: anyhow::Result<T>) -> anyhow::Result<T> {
        result.map_err(|error| {
            let log = match std::fs::read(&self.log) {
                Ok(log) => log,
                Err(unread) => {
                    return anyhow!(
                        "{error:#}; its log {} is unreadable: {unread}",
                        self.log.display()
                    );
                }
            };
            let log = String::from_utf8_lossy(&log);
            let lines: Vec<&str> = log.lines().collect();
            if lines.is_empty() {
                return anyhow!("{error:#}; its log is empty");
            }
            let end = lines
                .get(lines.len().saturating_sub(LOG_LINES)..)
                .unwrap_or_default();
            anyhow!("{error:#}. The end of its log:\n{}", end.join("\n"))
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A connection to the API of a peer.
pub struct Api {
    peer: Peer,
    stream: BufReader<UnixStream>,
}

impl Api {
    fn new(peer: Peer, stream: UnixStream) -> anyhow::Result<Self> {
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        stream.set_write_timeout(Some(ANSWER_MAX))?;
        Ok(Self {
            peer,
            stream: BufReader::new(stream),
        })
    }

    /// A request with a JSON body, or none; that it is refused is an error.
    pub fn request(&mut self, method: &str, path: &str, body: Option<&Value>) -> anyhow::Result<()> {
        let name = self.peer.name();
        let mut request = format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n");
        if let Some(body) = body {
            let body = body.to_string();
            let length = body.len();
            request.push_str(&format!(
                "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
            ));
        } else {
            request.push_str("\r\n");
        }
        // In one call: a server may take each read for a whole request.
        self.stream
            .get_mut()
            .write_all(request.as_bytes())
            .with_context(|| format!("cannot ask {name} for {method} {path}"))?;
        let (status, body) = self
            .answer()
            .with_context(|| format!("{name} did not answer to {method} {path}"))?;
        if !(200..300).contains(&status) {
            bail!("{name} refused {method} {path}: status {status}, {body}");
        }
        Ok(())
    }

    /// Status and body of an answer (RFC 9112, section 4), of which nothing is left in the connection.
    fn answer(&mut self) -> anyhow::Result<(u16, String)> {
        let first = self.line()?;
        let status = first
            .strip_prefix("HTTP/1.")
            .and_then(|rest| rest.split(' ').nth(1))
            .and_then(|status| status.parse().ok())
            .with_context(|| format!("this is no HTTP: {first:?}"))?;
        let mut length = 0u64;
        loop {
            let line = self.line()?;
            if line.is_empty() {
                break;
            }
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                length = value
                    .trim()
                    .parse()
                    .ok()
                    .filter(|length| *length <= BODY_MAX)
                    .with_context(|| format!("this is no length of an answer: {line:?}"))?;
            }
        }
        let mut body = Vec::new();
        self.stream.by_ref().take(length).read_to_end(&mut body)?;
        if (body.len() as u64) < length {
            bail!("the connection ended within the answer");
        }
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = Vec::new();
        self.stream.by_ref().take(BODY_MAX).read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            bail!("the connection ended within the answer");
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use serde_json::json;

    use super::*;

    fn shell(script: &str, log: &Path) -> Process {
        Process::start(
            Peer::CloudHypervisor,
            Command::new("/bin/sh").args(["-c", script]),
            None,
            log,
        )
        .unwrap()
    }

    /// A peer's end of a connection: reads as many requests as there are answers, sends each answer in the pieces given, and
    /// gives back what it was asked.
    fn serve(answers: Vec<Vec<&'static str>>) -> (Api, thread::JoinHandle<Vec<String>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || {
            let mut asked = Vec::new();
            for answer in answers {
                let mut bytes = [0u8; 4096];
                let count = theirs.read(&mut bytes).unwrap();
                asked.push(String::from_utf8_lossy(&bytes[..count]).into_owned());
                for piece in answer {
                    theirs.write_all(piece.as_bytes()).unwrap();
                    thread::sleep(Duration::from_millis(5));
                }
            }
            asked
        });
        (Api::new(Peer::CloudHypervisor, ours).unwrap(), server)
    }

    #[test]
    fn requests_are_told_apart_by_their_answers() {
        let (mut api, server) = serve(vec![
            vec!["HTTP/1.1 200 OK\r\nContent-Le", "ngth: 9\r\n\r\nHTTP", "/1.1 "],
            vec!["HTTP/1.1 400 Bad Request\r\ncontent-length: 14\r\n\r\nit is so tired"],
            vec!["HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n"],
        ]);
        api.request("PUT", "/vm.pause", None).unwrap();
        let refused = api.request("PUT", "/vm.snapshot", Some(&json!({ "to": "ä" })));
        assert_eq!(
            refused.unwrap_err().to_string(),
            "Cloud Hypervisor refused PUT /vm.snapshot: status 400, it is so tired"
        );
        api.request("PUT", "/vm.resume", None).unwrap();
        let asked = server.join().unwrap();
        assert_eq!(asked[0], "PUT /vm.pause HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert!(
            asked[1].ends_with("\r\nContent-Length: 11\r\n\r\n{\"to\":\"ä\"}"),
            "{}",
            asked[1]
        );
    }

    #[test]
    fn answers_that_are_none_are_errors() {
        for (answer, why) in [
            ("", "ended within the answer"),
            ("HTTP/1.1 204 No Content\r\n", "ended within the answer"),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfour",
                "ended within the answer",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
                "no length of an answer",
            ),
            (
                "HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
                "no length of an answer",
            ),
            ("SSH-2.0\r\n\r\n", "no HTTP"),
        ] {
            let (mut api, server) = serve(vec![vec![answer]]);
            let error = format!("{:#}", api.request("PUT", "/vm.pause", None).unwrap_err());
            server.join().unwrap();
            assert!(
                error.starts_with("Cloud Hypervisor did not answer to PUT /vm.pause: "),
                "{error}"
            );
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_process_without_its_api_is_an_error_with_the_end_of_its_log() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let mut process = shell("seq 30; echo no such kernel >&2; exit 3", &log);
        let result = process.connect(&directory.path().join("socket")).map(|_| ());
        let error = process.explain(result).unwrap_err().to_string();
        assert!(
            error.starts_with("cannot reach Cloud Hypervisor's API at "),
            "{error}"
        );
        assert!(
            error.contains("Cloud Hypervisor ended with exit status: 3"),
            "{error}"
        );
        assert!(error.ends_with("\n28\n29\n30\nno such kernel"), "{error}");
        assert!(!error.contains("\n11\n"), "{error}");
    }

    #[test]
    fn the_api_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let mut process = shell("exec sleep 60", &directory.path().join("log"));
        let server = thread::spawn({
            let socket = socket.clone();
            move || {
                thread::sleep(Duration::from_millis(20));
                let listener = UnixListener::bind(socket).unwrap();
                let (mut stream, _) = listener.accept().unwrap();
                let mut bytes = [0u8; 4096];
                let _ = stream.read(&mut bytes).unwrap();
                stream.write_all(b"HTTP/1.1 204 \r\n\r\n").unwrap();
            }
        });
        let mut api = process.connect(&socket).unwrap();
        api.request("PUT", "/vm.pause", None).unwrap();
        server.join().unwrap();
    }

    #[test]
    fn a_process_ends_with_its_handle() {
        let directory = tempfile::tempdir().unwrap();
        let process = shell("exec sleep 60", &directory.path().join("log"));
        let id = process.child.id();
        assert!(Path::new(&format!("/proc/{id}")).exists());
        drop(process);
        assert!(!Path::new(&format!("/proc/{id}")).exists());
    }
}
