//! A registry that does not behave: it serves an OCI layout, and breaks off, lies, stalls or asks for tokens as it is told.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What it does wrong.
#[derive(Clone, Default)]
pub struct Faults {
    /// Breaks the connection off after so many bytes of each answer.
    pub break_after: Option<usize>,
    /// Stops answering, without breaking off, after so many bytes of an answer.
    pub stall_after: Option<usize>,
    /// Knows nothing of ranges.
    pub no_ranges: bool,
    /// Changes a byte of what is larger than 1 MiB.
    pub flip: bool,
    /// Sends more than there is of what is larger than 1 MiB.
    pub too_much: bool,
    /// Asks for a token, which it hands out to `user` with `secret`.
    pub token: bool,
    /// Says of one manifest that it is another.
    pub other_manifest: bool,
}

/// Requests for content, as path and range.
type Requests = Arc<Mutex<Vec<(String, Option<String>)>>>;

pub struct Server {
    port: u16,
    /// Those for large content that came.
    pub requests: Requests,
    faults: Arc<Mutex<Faults>>,
}

impl Server {
    /// Serves a layout, under any name and tag.
    pub fn start(layout: &Path, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        let requests = Requests::default();
        let faults = Arc::new(Mutex::new(faults));
        let (layout, seen, told) = (layout.to_owned(), requests.clone(), faults.clone());
        // It ends with the test program.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let connection = Connection {
                    layout: layout.clone(),
                    requests: seen.clone(),
                    faults: told.lock().expect("the faults").clone(),
                    port,
                };
                std::thread::spawn(move || while connection.answer(&stream).is_some() {});
            }
        });
        Self {
            port,
            requests,
            faults,
        }
    }

    pub fn name(&self, image: &str) -> String {
        format!("127.0.0.1:{}/{image}", self.port)
    }

    /// Connections from now on get this.
    pub fn set(&self, faults: Faults) {
        *self.faults.lock().expect("the faults") = faults;
    }

    /// Where the answers to requests for large content began, and forgets them.
    pub fn ranges(&self) -> Vec<String> {
        std::mem::take(&mut *self.requests.lock().expect("the requests"))
            .into_iter()
            .filter_map(|(_, range)| range)
            .collect()
    }
}

struct Connection {
    layout: PathBuf,
    requests: Requests,
    faults: Faults,
    port: u16,
}

impl Connection {
    /// Answers one request; nothing if there is to be no other.
    fn answer(&self, stream: &TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let path = line.split(' ').nth(1)?.to_owned();
        let (mut range, mut authorization) = (None, String::new());
        loop {
            let mut header = String::new();
            reader.read_line(&mut header).ok()?;
            let header = header.trim_end();
            if header.is_empty() {
                break;
            }
            let (name, value) = header.split_once(": ")?;
            match name.to_ascii_lowercase().as_str() {
                "range" => range = Some(value.to_owned()),
                "authorization" => authorization = value.to_owned(),
                _ => {}
            }
        }
        let end = |status: &str, headers: &str, body: &[u8]| {
            let head = format!(
                "HTTP/1.1 {status}\r\nContent-Length: {}\r\n{headers}\r\n",
                body.len()
            );
            let mut stream = stream;
            stream.write_all(head.as_bytes()).ok()?;
            stream.write_all(body).ok()
        };
        if path.starts_with("/token") {
            // `user:secret`.
            return match authorization.as_str() {
                "Basic dXNlcjpzZWNyZXQ=" => end("200 OK", "", br#"{"token":"pass"}"#),
                _ => end("401 Unauthorized", "", b"{}"),
            };
        }
        if self.faults.token && authorization != "Bearer pass" {
            let challenge = format!(
                "WWW-Authenticate: Bearer realm=\"http://127.0.0.1:{}/token\",service=\"test\"\r\n",
                self.port
            );
            return end(
                "401 Unauthorized",
                &challenge,
                br#"{"errors":[{"code":"UNAUTHORIZED","message":"no"}]}"#,
            );
        }
        if path == "/v2/" {
            return end("200 OK", "", b"{}");
        }
        let hex = match path.rsplit_once('/')?.1 {
            digest if digest.starts_with("sha256:") => digest.strip_prefix("sha256:")?.to_owned(),
            _ => self.manifest(),
        };
        let Ok(mut body) = fs::read(self.layout.join("blobs/sha256").join(hex)) else {
            let unknown = br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"unknown"}]}"#;
            return end("404 Not Found", "", unknown);
        };
        if path.contains("/manifests/") {
            if self.faults.other_manifest {
                body.push(b' ');
            }
            return end(
                "200 OK",
                "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n",
                &body,
            );
        }
        self.content(stream, path, range, body)
    }

    fn content(
        &self,
        mut stream: &TcpStream,
        path: String,
        range: Option<String>,
        mut body: Vec<u8>,
    ) -> Option<()> {
        let is_large = body.len() > 1 << 20;
        if self.faults.flip && is_large {
            body[1 << 19] ^= 1;
        }
        if self.faults.too_much && is_large {
            body.extend([0; 1000]);
        }
        let from: usize = match &range {
            Some(range) if !self.faults.no_ranges => {
                let from = range.strip_prefix("bytes=")?.strip_suffix('-')?;
                from.parse().ok()?
            }
            _ => 0,
        };
        if is_large {
            self.requests.lock().ok()?.push((path, range.clone()));
        }
        let rest = body.get(from..)?;
        let status = match range {
            Some(_) if !self.faults.no_ranges => "206 Partial Content",
            _ => "200 OK",
        };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", rest.len());
        stream.write_all(head.as_bytes()).ok()?;
        for (limit, stalls) in [(self.faults.break_after, false), (self.faults.stall_after, true)] {
            if let Some(limit) = limit.filter(|limit| *limit < rest.len()) {
                stream.write_all(&rest[..limit]).ok()?;
                if stalls {
                    std::thread::sleep(std::time::Duration::from_secs(600));
                }
                let _ = stream.shutdown(std::net::Shutdown::Both);
                return None;
            }
        }
        stream.write_all(rest).ok()
    }

    /// The manifest of the layout.
    fn manifest(&self) -> String {
        let index = fs::read(self.layout.join("index.json")).unwrap_or_default();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap_or_default();
        let digest = index["manifests"][0]["digest"].as_str().unwrap_or_default();
        digest.trim_start_matches("sha256:").to_owned()
    }
}
