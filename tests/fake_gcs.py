"""A Google Cloud Storage of this machine, in memory, for tests.

The parts of the API that TensorFlow, TensorStore, ArrayRecord, gcsfs and
google-cloud-storage use. TensorFlow has its hosts built in, so it is sent here
through a proxy: the server answers CONNECT, and speaks TLS for whatever host
was meant.
"""

import contextlib
import email.parser
import email.policy
import http.server
import json
import os
import re
import ssl
import subprocess
import threading
import urllib.parse

_HOSTS = 'DNS:www.googleapis.com,DNS:storage.googleapis.com'


class FakeGcs:
  """The server, on a free port of localhost.

  Attributes:
    buckets: names of those that exist.
    objects: (bucket, name) -> (content, generation).
    denied: answers every request with 403 while it is true.
    requests: method and path of each.
  """

  def __init__(self, *buckets: str):
    self.buckets, self.objects = set(buckets), {}
    self.denied, self.requests = False, []
    self.lock = threading.RLock()
    self.uploads, self._generation = {}, 1000
    self.tls = None
    handler = type('Handler', (_Handler,), {'gcs': self})
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self._server.daemon_threads = True
    self.address = f'127.0.0.1:{self._server.server_address[1]}'

  def environment(self, folder: os.PathLike) -> dict[str, str]:
    """Returns the variables that send clients here; `folder`: for the keys."""
    pem = os.path.join(folder, 'fake_gcs.pem')
    subprocess.run(
      [
        *('openssl', 'req', '-x509', '-newkey', 'rsa:2048'),
        *('-nodes', '-days', '2'),
        *('-subj', '/CN=fake', '-addext', f'subjectAltName={_HOSTS}'),
        *('-keyout', pem, '-out', f'{pem}.crt'),
      ],
      check=True,
      capture_output=True,
    )
    self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    self.tls.load_cert_chain(f'{pem}.crt', pem)
    return {
      'https_proxy': f'http://{self.address}',
      'CURL_CA_BUNDLE': f'{pem}.crt',
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
      'TENSORSTORE_GCS_HTTP_URL': f'http://{self.address}',
      'CLOUD_STORAGE_EMULATOR_ENDPOINT': f'http://{self.address}',
      'STORAGE_EMULATOR_HOST': f'http://{self.address}',
    }

  def put(self, key: tuple[str, str], content: bytes) -> int:
    """Stores an object; returns its generation."""
    with self.lock:
      self._generation += 1
      self.objects[key] = (content, self._generation)
      return self._generation

  def __enter__(self) -> 'FakeGcs':
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *unused_exception) -> None:
    self._server.shutdown()
    self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
  """One connection; `gcs` is the server's state."""

  protocol_version = 'HTTP/1.1'
  disable_nagle_algorithm = True
  gcs: FakeGcs

  def log_message(self, *unused) -> None:
    pass

  def handle(self) -> None:
    with contextlib.suppress(OSError):  # the client has gone
      super().handle()

  def do_CONNECT(self) -> None:
    self.send_response(200)
    self.end_headers()
    self.connection = self.gcs.tls.wrap_socket(self.connection, server_side=True)
    self.rfile = self.connection.makefile('rb')
    self.wfile = self.connection.makefile('wb', 0)
    self.close_connection = False
    with contextlib.suppress(OSError):
      while not self.close_connection:
        self.handle_one_request()
    self.close_connection = True

  def _handle(self) -> None:
    url = urllib.parse.urlsplit(self.path)
    self.query = dict(urllib.parse.parse_qsl(url.query))
    self.body = self._read_body()
    self.gcs.requests.append(f'{self.command} {self.path}')
    if self.gcs.denied:
      self._json(403, {'error': {'code': 403, 'message': 'denied'}})
      return
    path = re.sub('^/(upload/|download/)?storage/v1', '', url.path)
    parts = [urllib.parse.unquote(p) for p in path.split('/')]
    with self.gcs.lock:
      if url.path.startswith('/upload/'):
        self._upload(parts[2])
      elif parts[1] != 'b':  # the old XML API, /bucket/object
        name = urllib.parse.unquote('/'.join(path.split('/')[2:]))
        self._read((parts[1], name), media=True)
      elif parts[2] not in self.gcs.buckets:
        self._missing()
      elif len(parts) == 3:
        self._json(200, {'name': parts[2], 'location': 'nowhere'})
      elif len(parts) == 4:
        self._list(parts[2])
      elif 'rewriteTo' in parts or 'copyTo' in parts:
        self._copy((parts[2], parts[4]), (parts[7], parts[9]))
      elif self.command == 'DELETE':
        self._delete((parts[2], parts[4]))
      else:
        key = (parts[2], '/'.join(parts[4:]))
        self._read(key, media=self.query.get('alt') == 'media')

  do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _handle

  def _read_body(self) -> bytes:
    if self.headers.get('Transfer-Encoding') != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length') or 0))
    body = b''
    while size := int(self.rfile.readline().strip() or b'0', 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _answer(self, status: int, body: bytes = b'', **headers) -> None:
    self.send_response(status)
    self.send_header('Content-Length', str(len(body)))
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), str(value))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  def _json(self, status: int, value) -> None:
    body = json.dumps(value).encode()
    self._answer(status, body, Content_Type='application/json')

  def _missing(self) -> None:
    self._json(404, {'error': {'code': 404, 'message': 'Not Found'}})

  def _resource(self, key: tuple[str, str]) -> dict[str, str]:
    content, generation = self.gcs.objects[key]
    return {
      'kind': 'storage#object',
      'bucket': key[0],
      'name': key[1],
      'size': str(len(content)),
      'generation': str(generation),
      'metageneration': '1',
      'updated': '2026-01-01T00:00:00.000Z',
      'timeCreated': '2026-01-01T00:00:00.000Z',
      'storageClass': 'STANDARD',
    }

  def _fails_precondition(self, key: tuple[str, str]) -> bool:
    wanted = self.query.get('ifGenerationMatch')
    found = self.gcs.objects.get(key, (b'', 0))[1]
    if wanted is None or int(wanted) == found:
      return False
    self._json(412, {'error': {'code': 412, 'message': 'conditionNotMet'}})
    return True

  def _is_there(self, key: tuple[str, str]) -> bool:
    """Whether the object is there, in the generation that is asked for."""
    found = self.gcs.objects.get(key, (b'', 0))[1]
    return found > 0 and self.query.get('generation', str(found)) == str(found)

  def _read(self, key: tuple[str, str], *, media: bool) -> None:
    if not self._is_there(key):
      self._missing()
      return
    content, generation = self.gcs.objects[key]
    if not media:
      self._json(200, self._resource(key))
      return
    if self._fails_precondition(key):
      return
    if self.query.get('ifGenerationNotMatch') == str(generation):
      self._answer(304, x_goog_generation=generation)
      return
    headers = {'x_goog_generation': generation}
    span = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
    if not span:
      self._answer(200, content, **headers)
      return
    first, last = int(span[1] or 0), int(span[2] or len(content))
    if not span[1]:  # that many from the end
      first, last = max(len(content) - last, 0), len(content)
    last = min(last, len(content) - 1)
    if first >= len(content):
      self._answer(416, Content_Range=f'bytes */{len(content)}', **headers)
      return
    headers['Content_Range'] = f'bytes {first}-{last}/{len(content)}'
    self._answer(206, content[first : last + 1], **headers)

  def _list(self, bucket: str) -> None:
    prefix = self.query.get('prefix', '')
    delimiter = self.query.get('delimiter')
    start = self.query.get('startOffset', '')
    end = self.query.get('endOffset')
    names = sorted(n for b, n in self.gcs.objects if b == bucket)
    items, prefixes = [], []
    for name in names:
      if not name.startswith(prefix) or name < start or (end and name >= end):
        continue
      rest = name[len(prefix) :]
      if delimiter and delimiter in rest:
        prefixes.append(prefix + rest[: rest.index(delimiter) + 1])
      else:
        items.append(self._resource((bucket, name)))
    listing = {'kind': 'storage#objects', 'items': items}
    self._json(200, listing | {'prefixes': sorted(set(prefixes))})

  def _upload(self, bucket: str) -> None:
    if bucket not in self.gcs.buckets:
      self._missing()
    elif 'upload_id' in self.query:
      self._finish_upload()
    elif self.query['uploadType'] == 'resumable':
      named = json.loads(self.body or b'{}')
      key = (bucket, self.query.get('name') or named['name'])
      number = str(len(self.gcs.uploads) + 1)
      self.gcs.uploads[number] = [key, b'', self.query]
      host = f'http://{self.gcs.address}'
      url = f'{host}/upload/storage/v1/b/{bucket}/o?upload_id={number}'
      self._answer(200, Location=url)
    elif self.query['uploadType'] == 'media':
      self._store((bucket, self.query['name']), self.body)
    else:
      headers = f'Content-Type: {self.headers["Content-Type"]}\r\n\r\n'
      parser = email.parser.BytesParser(policy=email.policy.HTTP)
      about, content = parser.parsebytes(headers.encode() + self.body).iter_parts()
      name = json.loads(about.get_content())['name']
      self._store((bucket, name), content.get_payload(decode=True))

  def _finish_upload(self) -> None:
    upload = self.gcs.uploads[self.query['upload_id']]
    upload[1] += self.body
    total = self.headers.get('Content-Range', '/0').rpartition('/')[2]
    if total == '*':
      self._answer(308, Range=f'bytes=0-{len(upload[1]) - 1}')
    else:
      self.query = upload[2]  # its preconditions are those of the beginning
      self._store(*upload[:2])

  def _store(self, key: tuple[str, str], content: bytes) -> None:
    if not self._fails_precondition(key):
      self.gcs.put(key, content)
      self._json(200, self._resource(key))

  def _copy(self, source: tuple[str, str], target: tuple[str, str]) -> None:
    if source not in self.gcs.objects:
      self._missing()
      return
    self.gcs.put(target, self.gcs.objects[source][0])
    self._json(200, {'done': True, 'resource': self._resource(target)})

  def _delete(self, key: tuple[str, str]) -> None:
    if not self._is_there(key):
      self._missing()
    elif not self._fails_precondition(key):
      del self.gcs.objects[key]
      self._answer(204)
