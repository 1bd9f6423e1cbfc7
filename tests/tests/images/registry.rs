//! Debian's `docker-registry`, on loopback, and `skopeo`, which fills it.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::tool;

/// `user` and `secret`.
const PASSWORDS: &str = "user:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

pub struct Registry {
    process: Child,
    port: u16,
    directory: TempDir,
}

impl Registry {
    /// One that everybody may use.
    pub fn start() -> Self {
        Self::with("")
    }

    /// One that asks for a user's name and password.
    pub fn with_passwords() -> Self {
        Self::with("auth: {htpasswd: {realm: test, path: PASSWORDS}}\n")
    }

    /// One that speaks TLS, with a certificate of an authority that nobody knows: [`Registry::authority`].
    pub fn with_tls() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name).display().to_string();
        let (key, certificate) = (at("key.pem"), at("certificate.pem"));
        let made = |subject: &str, key: &str, certificate: &str, more: &[&str]| {
            let mut arguments = vec![
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
            ];
            arguments.extend([
                "-nodes",
                "-days",
                "2",
                "-subj",
                subject,
                "-keyout",
                key,
                "-out",
                certificate,
            ]);
            arguments.extend(more);
            tool("openssl", &arguments);
        };
        let (authority_key, authority) = (at("authority-key.pem"), at("authority.pem"));
        made("/CN=authority", &authority_key, &authority, &[]);
        let more = [
            "-CA",
            &authority,
            "-CAkey",
            &authority_key,
            "-addext",
            "subjectAltName=DNS:localhost",
        ];
        made(
            "/CN=localhost",
            &key,
            &certificate,
            &[&more[..], &["-addext", "basicConstraints=CA:FALSE"]].concat(),
        );
        Self::in_directory(
            directory,
            "",
            &format!(", tls: {{key: {key}, certificate: {certificate}}}"),
        )
    }

    /// Where the certificate of that authority lies.
    pub fn authority(&self) -> std::path::PathBuf {
        self.directory.path().join("authority.pem")
    }

    fn with(more: &str) -> Self {
        Self::in_directory(tempfile::tempdir().expect("a directory"), more, "")
    }

    fn in_directory(directory: TempDir, more: &str, http: &str) -> Self {
        let at = |name: &str| directory.path().join(name).display().to_string();
        std::fs::write(at("passwords"), PASSWORDS).expect("the passwords");
        let port = free_port();
        let configuration = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:{port}'{http}}}\n{}",
            at("data"),
            more.replace("PASSWORDS", &at("passwords"))
        );
        std::fs::write(at("config.yml"), configuration).expect("the configuration");
        let process = Command::new("docker-registry")
            .args(["serve", &at("config.yml")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry starts; `make setup` installs it");
        let mut registry = Self {
            process,
            port,
            directory,
        };
        let begun = Instant::now();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            if begun.elapsed() > Duration::from_secs(60) {
                let mut said = String::new();
                let _ = registry.process.kill();
                let _ = registry
                    .process
                    .stderr
                    .take()
                    .expect("piped")
                    .read_to_string(&mut said);
                panic!("docker-registry does not answer: {said}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        registry
    }

    /// The name of an image in it.
    pub fn name(&self, image: &str) -> String {
        format!("localhost:{}/{image}", self.port)
    }

    /// Brings an image into it, as `skopeo` names images, with options of `skopeo copy`.
    pub fn fill(&self, from: &str, image: &str, options: &[&str]) {
        let to = format!("docker://{}", self.name(image));
        let mut arguments = vec!["copy", "--quiet", "--dest-tls-verify=false", "--insecure-policy"];
        arguments.extend(options);
        arguments.extend([from, &to]);
        tool("skopeo", &arguments);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
        .port()
}
