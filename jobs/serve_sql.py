"""`trailvec serve_sql`: Spark's own Thrift server over the tables, with trailvec's functions, for JDBC and ODBC.

trailvec serve_sql --conf conf/local.toml        # 127.0.0.1:10000, for every account of this machine
TRAILVEC_SQL_USER=ada TRAILVEC_SQL_PASSWORD=… trailvec serve_sql --conf conf/local.toml --host 0.0.0.0

Each client has its own session, so USE, SET and temporary views are private to it. The functions are in the registry
that every new session copies. Clients may do whatever the server's account may, including writing and running programs
(SELECT TRANSFORM ... USING). The server wipes trailvec's secrets and MLflow's from its environment, but not a
store's keys or the variables that Kafka's options name (`${NAME}`); the environment of the process that started it, a
shell or a wrapper, stays readable to programs of the same account.
"""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import SparkSession

from jobs.config import Config
from jobs.errors import TrailvecError, one_sentence
from jobs.runtime import Runtime
from jobs.segment_files import KEY as EXPORT_KEY
from jobs.sql import prepare
from jobs.sql_names import register_tables
from jobs.tombstones import ERASE_KEY
from spark_udfs.nearest_of_user import TABLE_FUNCTIONS
from spark_udfs.vectors import FUNCTIONS

_LOGIN = ("TRAILVEC_SQL_USER", "TRAILVEC_SQL_PASSWORD")
_TRACKING = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # only train needs them
SECRETS = (*_LOGIN, EXPORT_KEY, ERASE_KEY, *_TRACKING)
_LOGIN_CLASS = "TrailvecLogin"
_CLASS_PATH = "spark.driver.extraClassPath"
_LOOK_AGAIN_SECONDS = 10.0
_SETTINGS = {
    # Stream large results partition by partition instead of collecting them in the server's memory. (A single
    # partition that exceeds the memory still kills the server.)
    "spark.sql.thriftServer.incrementalCollect": "true",
    # Spark's page shows all clients' statements to whoever opens it, and lets them kill jobs: it asks for no password.
    "spark.ui.enabled": "false",
}
# Compiled at run time by Janino, which Spark ships for its generated code, so there is no jar to build or ship. Hive
# instantiates the class for each connection. It holds a salted digest, not the password. Hive passes each byte of a
# name or password as one character, so the UTF-8 bytes have to be reassembled.
_LOGIN_CHECK = """
import java.math.BigInteger;
import java.security.MessageDigest;
import javax.security.sasl.AuthenticationException;
import org.apache.hive.service.auth.PasswdAuthenticationProvider;

public class TrailvecLogin implements PasswdAuthenticationProvider {
    public void Authenticate(String user, String password) throws AuthenticationException {
        String login = "%(salt)s" + user + "\\0" + password;
        byte[] bytes = new byte[login.length()];
        for (int i = 0; i < bytes.length; i++) bytes[i] = (byte) login.charAt(i);
        byte[] digest;
        try {
            digest = MessageDigest.getInstance("SHA-256").digest(bytes);
        } catch (java.security.NoSuchAlgorithmException error) {
            throw new AuthenticationException(error.getMessage());
        }
        byte[] right = new BigInteger("%(digest)s", 16).toByteArray();
        if (!MessageDigest.isEqual(right, new BigInteger(1, digest).toByteArray()))
            throw new AuthenticationException("wrong user or password");
    }
}
"""


def run_serve(config: Config, host: str, port: int) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        TrailvecError: the address is unavailable, or is reachable by others while no credentials are set; or Spark
            has died.
    """
    login = _login()
    _check_address(host, port, login is not None)
    # Clients can read the JVM's environment, which is a copy of this process's, and by a program also this one.
    for name in SECRETS:
        _forget(name)
    stopped = threading.Event()
    with tempfile.TemporaryDirectory(prefix="trailvec-sql-") as scratch:
        settings = _SETTINGS | config.spark.conf
        settings[_CLASS_PATH] = os.pathsep.join(filter(None, [scratch, settings.get(_CLASS_PATH)]))
        runtime = Runtime(config.model_copy(update={"spark": config.spark.model_copy(update={"conf": settings})}))
        spark = runtime.spark
        prepare(runtime)
        _share_functions(spark)
        server = _start(spark, host, port, login, Path(scratch))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        address = f"[{host}]" if ":" in host else host
        print(f"SQL at jdbc:hive2://{address}:{port}/{config.storage.database} (Ctrl-C stops it)", flush=True)
        _watch(runtime, stopped)
        server.stop()
        spark.stop()


def _login() -> str | None:
    """The source of the Java class that authenticates clients; None if no login is required.

    Raises:
        TrailvecError: only one of user and password is set, or one is empty.
    """
    user, password = (os.environ.get(name) for name in _LOGIN)
    if user is None and password is None:
        return None
    if not user or not password:
        raise TrailvecError(f"one of {_LOGIN[0]} and {_LOGIN[1]} is missing or empty: set both or neither")
    salt = secrets.token_hex(16)
    # fsencode: the bytes as set, even if they aren't UTF-8.
    digest = hashlib.sha256(os.fsencode(f"{salt}{user}\0{password}")).hexdigest()
    return _LOGIN_CHECK % {"salt": salt, "digest": digest}


def _forget(name: str) -> None:
    """Unsets an environment variable and zeroes its value in the process's initial environment block, which
    /proc/PID/environ still shows after unsetting."""
    if os.name == "posix" and (value := os.environb.get(os.fsencode(name))):
        libc = ctypes.CDLL(None)
        libc.getenv.restype = ctypes.c_void_p
        if address := libc.getenv(os.fsencode(name)):
            ctypes.memset(address, 0, len(value))
    os.environ.pop(name, None)


def _check_address(host: str, port: int, with_password: bool) -> None:
    for name in ("HIVE_SERVER2_THRIFT_BIND_HOST", "HIVE_SERVER2_THRIFT_PORT"):
        if name in os.environ:  # overrides the settings given to Spark's server
            raise TrailvecError(f"{name} is set and would override --host and --port: unset it")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError, OverflowError):
        raise TrailvecError(f"{host}:{port} is not an address of this machine: correct --host or --port") from None
    loopback = all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in addresses)
    if not loopback and not with_password:
        raise TrailvecError(
            f"{host} can be reached from other machines: set {_LOGIN[0]} and {_LOGIN[1]}, or serve on 127.0.0.1"
        )
    if not with_password:
        print(
            f"no password is set: every account of this machine may read the tables and run programs as this one; "
            f"set {_LOGIN[0]} and {_LOGIN[1]} to keep others out",
            file=sys.stderr,
        )
    family, kind, protocol, _, address = addresses[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(address)
        except OSError as error:
            raise TrailvecError(
                f"can't serve on {host}:{port} ({error.strerror}): choose another --host or --port"
            ) from None


def _share_functions(spark: SparkSession) -> None:
    """Adds the session's functions to Spark's built-in registry, which every new session copies. (Table functions only
    exist if the tables are local.)"""
    catalyst: Any = spark._jvm.org.apache.spark.sql.catalyst  # type: ignore[union-attr]
    state = spark._jsparkSession.sessionState()
    for names, registry, kind in (
        (FUNCTIONS, state.functionRegistry(), "FunctionRegistry$"),
        (TABLE_FUNCTIONS, state.tableFunctionRegistry(), "TableFunctionRegistry$"),
    ):
        builtin = getattr(getattr(catalyst.analysis, kind), "MODULE$").builtin()
        for name in names:
            identifier = catalyst.FunctionIdentifier(name)
            info, builder = registry.lookupFunction(identifier), registry.lookupFunctionBuilder(identifier)
            if info.isDefined():
                builtin.registerFunction(identifier, info.get(), builder.get())


def _start(spark: SparkSession, host: str, port: int, login: str | None, scratch: Path) -> Any:
    """The running server, a HiveThriftServer2 of the JVM."""
    jvm: Any = spark._jvm
    system = jvm.java.lang.System
    # Otherwise Hive's empty metastore writes derby.log into the working directory.
    system.setProperty("derby.stream.error.method", "java.io.OutputStream.nullOutputStream")
    (scratch / "local").mkdir()
    hadoop = spark._jsc.hadoopConfiguration()
    for key, value in {
        "hive.server2.thrift.bind.host": host,
        "hive.server2.thrift.port": str(port),
        "hive.server2.authentication": "CUSTOM" if login else "NONE",
        # Hive's default reads HDFS as whatever name a client logs in with, instead of as the server's account.
        "hive.server2.enable.doAs": "false",
        "hive.exec.scratchdir": str(scratch / "scratch"),
        "hive.exec.local.scratchdir": str(scratch / "local"),
        "hive.downloaded.resources.dir": str(scratch / "resources"),
        "hive.querylog.location": str(scratch / "log"),
        "hive.server2.logging.operation.log.location": str(scratch / "operations"),
    }.items():
        hadoop.set(key, value)
    if login:
        # Load it from the driver's class path: serving a query changes a thread's class loader, and only classes of the
        # application's loader are visible to all threads.
        compiler = jvm.org.codehaus.janino.SimpleCompiler()
        compiler.cook(login)
        file = scratch / f"{_LOGIN_CLASS}.class"
        file.write_bytes(bytes(compiler.getBytecodes()[_LOGIN_CLASS]))
        jvm.java.lang.Class.forName(_LOGIN_CLASS)
        file.unlink()  # so that nobody can read the digest
        # A connection's HiveConf ignores Spark's settings but reads system properties.
        system.setProperty("hive.server2.custom.authentication.class", _LOGIN_CLASS)
    start: Any = jvm.org.apache.spark.sql.hive.thriftserver.HiveThriftServer2.startWithContext
    return start(spark._jsparkSession.sqlContext())


def _watch(runtime: Runtime, stopped: threading.Event) -> None:
    """Until stopped, keeps registering tables that stages have created or clients have dropped. (The views look up the
    current model themselves.) A failing store, or a client's table with a conflicting name, is reported once and
    retried.

    Raises:
        TrailvecError: Spark has died, and with it the server.
    """
    failing = ended = False
    while not stopped.wait(_LOOK_AGAIN_SECONDS):
        try:
            ended = runtime.spark._jsc.sc().isStopped()
            if not ended:
                register_tables(runtime)
                failing = False
        except (PySparkException, Py4JJavaError, TrailvecError) as error:
            if not failing:
                message = one_sentence(error)
                again = f"trying again every {_LOOK_AGAIN_SECONDS:g} seconds; the tables registered so far are served"
                print(f"can't register all tables ({message}): {again}", file=sys.stderr, flush=True)
            failing = True
        except (Py4JError, ConnectionError) as error:
            raise TrailvecError(
                "the server's Java process has ended, usually for lack of memory (one partition of a result has to fit "
                "into it): increase spark.driver.memory, and start the server again"
            ) from error
        if ended:
            raise TrailvecError(
                "Spark has ended (its application was killed, say), but the server's Java process is still running: "
                "start the server again"
            )
