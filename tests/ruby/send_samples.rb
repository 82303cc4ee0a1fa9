# Sends the samples as Chatwoot does, with the HTTP client of its old or of its new versions.
#
#     ruby send_samples.rb rest-client|net-http URL SAMPLES_DIRECTORY [SECRET]
#
# With a secret, each sample is signed with the current time. Without one, it is sent unchanged. Each answer is
# written as a line of JSON: {"name", "status", "body"}.
require "json"
require "net/http"
require "openssl"
require "rest-client"

TIMEOUT_S = 30

# Chatwoot up to 4.13.
def send_by_rest_client(url, body, headers)
  response = RestClient::Request.execute(
    method: :post, url: url, payload: body, headers: headers, timeout: TIMEOUT_S
  )
  [response.code, response.body]
rescue RestClient::ExceptionWithResponse => error
  [error.http_code, error.response.body]
end

# Chatwoot from 4.14 on: a connection for each request.
def send_by_net_http(url, body, headers)
  uri = URI(url)
  request = Net::HTTP::Post.new(uri)
  headers.each { |name, value| request[name] = value }
  request.body = body
  options = { open_timeout: TIMEOUT_S, read_timeout: TIMEOUT_S, max_retries: 0 }
  response = Net::HTTP.start(uri.host, uri.port, **options) { |http| http.request(request) }
  [response.code.to_i, response.body]
end

def signed(headers, body, secret)
  timestamp = Time.now.to_i.to_s
  signature = OpenSSL::HMAC.hexdigest("SHA256", secret, "#{timestamp}.#{body}")
  headers.merge("X-Chatwoot-Timestamp" => timestamp, "X-Chatwoot-Signature" => "sha256=#{signature}")
end

SENDERS = { "rest-client" => method(:send_by_rest_client), "net-http" => method(:send_by_net_http) }.freeze

client, url, directory, secret = ARGV
manifest = JSON.parse(File.read(File.join(directory, "manifest.json")))
manifest["samples"].each do |name, sample|
  body = File.binread(File.join(directory, "#{name}.json"))
  headers = sample["headers"]
  headers = signed(headers, body, secret) if secret
  status, answer = SENDERS.fetch(client).call(url, body, headers)
  puts JSON.generate("name" => name, "status" => status, "body" => JSON.parse(answer))
end
